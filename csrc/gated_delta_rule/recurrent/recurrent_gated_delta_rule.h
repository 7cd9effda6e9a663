// The recurrent gated delta rule: decode, with the states in a pool that is updated in place.
//
// Per sequence n and value head h (query/key head h / (H / Hk)), token by token, with S = pool[rows[n], h] in fp32:
//   S  <- exp(g_t) S
//   u  =  beta_t (v_t - S^T k_t)
//   S  <- S + k_t u^T
//   o_t = scale S^T q_t
// With l2norm_qk, q_t and k_t are first replaced by x / sqrt(sum x^2 + kL2NormEps). S is rounded to the dtype of the
// pool once, after the last token. A negative row touches no state and gives zero outputs.
#pragma once

#include "csrc/common/dtype.h"
#include "csrc/common/parallel.h"
#include "csrc/gated_delta_rule/inputs.h"

namespace jet {

struct RecurrentGatedDeltaRuleParams {
  Dtype dtype;                // of q, k, v, o. "real" below is fp64 iff it is f64, else fp32
  Dtype g_dtype, beta_dtype;  // real on a CPU
  int64_t N, T, H, Hk, K, V;
  double scale;
  bool l2norm_qk;
  const void* q;     // [N, T, Hk, K] dtype
  const void* k;     // [N, T, Hk, K] dtype
  const void* v;     // [N, T, H, V] dtype
  const void* g;     // [N, T, H] g_dtype, log decay
  const void* beta;  // [N, T, H] beta_dtype
  TokenStrides q_strides, k_strides, v_strides, g_strides, beta_strides;
  StatePool pool;  // dtype f64 iff the inputs' is, else f32 or bf16
  void* o;         // [N, T, H, V] dtype, contiguous
};

// May throw std::bad_alloc, before anything is written.
void recurrent_gated_delta_rule_cpu(const RecurrentGatedDeltaRuleParams& p, const Parallel& parallel);

// On the current CUDA device, of compute capability 9.0, in `stream` (a cudaStream_t). p must satisfy
// recurrent_kernel_takes(p).
void recurrent_gated_delta_rule_hopper(const RecurrentGatedDeltaRuleParams& p, void* stream);

}  // namespace jet
