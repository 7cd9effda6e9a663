// The chunked gated delta rule: prefill and training.
//
// Per sequence and value head h (query/key head h / (H / Hk)), with a state S [K, V]:
//   S  <- exp(g_t) S
//   u  =  beta_t (v_t - S^T k_t)
//   S  <- S + k_t u^T
//   o_t = scale S^T q_t
// With l2norm_qk, q_t and k_t are first replaced by x / sqrt(sum x^2 + kL2NormEps). g is clamped from below at
// kMinLogDecay. g <= 0 is the caller's to see to: it is a decay. A positive g makes the state grow by e^g; that is
// computed as long as e^{c_i-c_j} of a chunk stays finite, 88 in fp32 for C tokens together, and is infinity or NaN
// from there on, without a word. NaN in g spoils all from its token on. A token changes nothing before it, whatever it
// holds: NaN and infinities reach what the token loop lets them reach. Computed C = kChunk tokens at a time, c_i the
// chunk-local cumulative sum of g:
//   kk = tril(K K^T ∘ e^{c_i-c_j}, -1)      T = (I + diag(beta) kk)^-1
//   R  = V - diag(e^c) K S0                 U = T diag(beta) R
//   O  = scale (diag(e^c) Q S0 + tril(Q K^T ∘ e^{c_i-c_j}) U)
//   S1 = e^{c_C} S0 + K^T diag(e^{c_C-c}) U
#pragma once

#include "csrc/common/dtype.h"
#include "csrc/common/parallel.h"
#include "csrc/gated_delta_rule/inputs.h"

namespace jet {

constexpr int64_t kChunk = 64;
constexpr double kMinLogDecay =
    -104.0;  // exp(-104) is zero in fp32; sums of it stay finite where -inf - -inf would not

struct ChunkGatedDeltaRuleParams {
  Dtype dtype;  // of q, k, v, o and the gradients of q, k, v. "real" below is fp64 iff it is f64, else fp32
  int64_t B, T, N, H, Hk, K, V;  // N sequences: B of T tokens, or the N slices of one batch row that cu_seqlens names
  double scale;
  bool l2norm_qk;
  const void* q;              // [B, T, Hk, K] dtype
  const void* k;              // [B, T, Hk, K] dtype
  const void* v;              // [B, T, H, V] dtype
  const void* g;              // [B, T, H] real, log decay
  const void* beta;           // [B, T, H] real
  const void* initial_state;  // [N, H, K, V] real; null: zeros
  TokenStrides q_strides, k_strides, v_strides, g_strides, beta_strides;
  StateStrides initial_state_strides;
  const int64_t* cu_seqlens;  // [N + 1] on the host; null: N = B
  void* o;                    // [B, T, H, V] dtype, contiguous
  void* final_state;          // [N, H, K, V] real, contiguous
};

struct ChunkGatedDeltaRuleBackwardParams {
  ChunkGatedDeltaRuleParams forward;  // o and final_state are not read
  const void* grad_o;                 // [B, T, H, V] dtype
  const void* grad_final_state;       // [N, H, K, V] real; null: zeros
  TokenStrides grad_o_strides;
  StateStrides grad_final_state_strides;
  void* dq;              // [B, T, Hk, K] dtype, contiguous, summed over the heads of a group
  void* dk;              // [B, T, Hk, K] dtype, contiguous, summed over the heads of a group
  void* dv;              // [B, T, H, V] dtype, contiguous
  void* dg;              // [B, T, H] real, contiguous
  void* dbeta;           // [B, T, H] real, contiguous
  void* dinitial_state;  // [N, H, K, V] real, contiguous
};

// Sequences that only the device knows.
struct DeviceOffsets {
  const void* data;  // [N + 1], contiguous; null: N = B
  IndexType type;
};

// Forward on a GPU of compute capability 9.0, for what chunk_kernel_takes() takes. p.cu_seqlens is not read.
struct ChunkGatedDeltaRuleLaunch {
  ChunkGatedDeltaRuleParams p;  // q, k, v as chunk_kernel_reads() wants them
  DeviceOffsets cu_seqlens;
  void* workspace;  // 128-byte aligned; what is left in it is described in workspace.h
};
int64_t chunk_gated_delta_rule_workspace(const ChunkGatedDeltaRuleParams& p,
                                         bool packed);  // bytes, on the current device
void chunk_gated_delta_rule_hopper(const ChunkGatedDeltaRuleLaunch& launch, void* stream);

// Both may throw std::bad_alloc, before anything is written.
void chunk_gated_delta_rule_cpu(const ChunkGatedDeltaRuleParams& p, const Parallel& parallel);
void chunk_gated_delta_rule_backward_cpu(const ChunkGatedDeltaRuleBackwardParams& p, const Parallel& parallel);

}  // namespace jet
