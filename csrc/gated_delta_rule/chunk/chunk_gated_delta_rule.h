// The chunked gated delta rule: prefill and training.
//
// Per sequence and value head h, which reads query/key head h / (H / Hk) (grouped value attention, GVA), with a state
// S [K, V]:
//   S  <- exp(g_t) S
//   u  =  beta_t (v_t - S^T k_t)
//   S  <- S + k_t u^T
//   o_t = scale S^T q_t
// With l2norm_qk, q_t and k_t are first replaced by x / sqrt(sum x^2 + kL2NormEps). g is clamped from below at
// kMinLogDecay.
//
// g <= 0 is the caller's to see to: it is a decay. A positive g makes the state grow by e^g; that is computed as long
// as e^{c_i-c_j} of a chunk stays finite, 88 in fp32 for C tokens together, and is infinity or NaN from there on,
// without a word. NaN in g spoils all from its token on. A token changes nothing before it, whatever it holds: NaN and
// infinities reach what the token loop lets them reach.
//
// Computed C = kChunk tokens at a time, c_i the chunk-local cumulative sum of g:
//   kk = tril(K K^T ∘ e^{c_i-c_j}, -1)      T = (I + diag(beta) kk)^-1
//   R  = V - diag(e^c) K S0                 U = T diag(beta) R
//   O  = scale (diag(e^c) Q S0 + tril(Q K^T ∘ e^{c_i-c_j}) U)
//   S1 = e^{c_C} S0 + K^T diag(e^{c_C-c}) U
// T diag(beta) is the papers' UT transform, U their U - W S0 of the WY representation; what contains S0 is the
// inter-chunk part, tril(Q K^T ∘ ..) U the intra-chunk part. docs/glossary.md has the names of flash-linear-attention.
#pragma once

#include "csrc/common/parallel.h"
#include "csrc/gated_delta_rule/inputs.h"

namespace jet {

constexpr int64_t kChunk = 64;
// exp(-104) is zero in fp32, and sums of it stay finite where -inf - -inf would not.
constexpr double kMinLogDecay = -104.0;

struct ChunkGatedDeltaRuleParams {
  GatedDeltaRuleInputs in;    // g and beta are real
  int64_t N;                  // sequences: B of T tokens, or the N slices of one batch row that cu_seqlens names
  StateTensor initial_state;  // [N, H, K, V]
  IndexVector cu_seqlens;     // [N + 1]; null: N = B
  void* o;                    // [B, T, H, V] dtype of q, contiguous
  void* final_state;          // [N, H, K, V] real, contiguous
};

struct ChunkGatedDeltaRuleBackwardParams {
  ChunkGatedDeltaRuleParams forward;  // o and final_state are not read
  TokenTensor grad_o;                 // [B, T, H, V], dtype of q
  StateTensor grad_final_state;       // [N, H, K, V]
  void* dq;                           // [B, T, Hk, K] dtype, contiguous, summed over the heads of a group
  void* dk;                           // [B, T, Hk, K] dtype, contiguous, summed over the heads of a group
  void* dv;                           // [B, T, H, V] dtype, contiguous
  void* dg;                           // [B, T, H] real, contiguous
  void* dbeta;                        // [B, T, H] real, contiguous
  void* dinitial_state;               // [N, H, K, V] real, contiguous
};

// Forward on the current CUDA device, of compute capability 9.0, in `stream` (a cudaStream_t), for what
// chunk_kernel_takes() takes; q, k and v as chunk_kernel_reads() wants them. `workspace`: 128-byte aligned, of so many
// bytes; workspace.h says what is left in it.
int64_t chunk_gated_delta_rule_workspace(const ChunkGatedDeltaRuleParams& p);
void chunk_gated_delta_rule_hopper(const ChunkGatedDeltaRuleParams& p, void* workspace, void* stream);

// The backward likewise, grad_o as chunk_kernel_reads() wants it too. backward/workspace.h says what is in its
// workspace.
int64_t chunk_gated_delta_rule_backward_workspace(const ChunkGatedDeltaRuleBackwardParams& p);
void chunk_gated_delta_rule_backward_hopper(const ChunkGatedDeltaRuleBackwardParams& p, void* workspace, void* stream);

// Both may throw std::bad_alloc, before anything is written.
void chunk_gated_delta_rule_cpu(const ChunkGatedDeltaRuleParams& p, const Parallel& parallel);
void chunk_gated_delta_rule_backward_cpu(const ChunkGatedDeltaRuleBackwardParams& p, const Parallel& parallel);

}  // namespace jet
