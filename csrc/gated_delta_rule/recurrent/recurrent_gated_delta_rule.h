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

#include "csrc/common/parallel.h"
#include "csrc/gated_delta_rule/inputs.h"

namespace jet {

struct RecurrentGatedDeltaRuleParams {
  GatedDeltaRuleInputs in;  // B: the sequences n
  StatePool pool;           // f64 iff q is, else f32 or bf16
  void* o;                  // [B, T, H, V] dtype of q, contiguous
};

// May throw std::bad_alloc, before anything is written.
void recurrent_gated_delta_rule_cpu(const RecurrentGatedDeltaRuleParams& p, const Parallel& parallel);

// On the current CUDA device, of compute capability 9.0, in `stream` (a cudaStream_t). p must satisfy
// recurrent_kernel_takes(p).
void recurrent_gated_delta_rule_hopper(const RecurrentGatedDeltaRuleParams& p, void* stream);

// What a JetBlock makes its gates of: g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b).
struct GateParameters {
  NumberVector A_log, dt_bias;  // [H]
};

// The same for one token (T = 1) as a JetBlock's projections give it (csrc/jet_block_step): q and k are those before
// SiLU, g and beta are a and b. o is fp32.
void recurrent_jet_block_step_hopper(const RecurrentGatedDeltaRuleParams& p, const GateParameters& gates, void* stream);

}  // namespace jet
