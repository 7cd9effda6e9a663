// Speculative decoding, second half: advances the pool by the accepted prefix of the tokens that
// recurrent_gated_delta_rule_verify saw. Per sequence n and value head h, for t < num_accepted[n], with S =
// pool[rows[n], h]:
//   S <- exp(g_t) S + k_t u_t^T
// Equal to recurrent_gated_delta_rule on those tokens. S is rounded to the dtype of the pool once, after the last
// token. A negative row, or no accepted token, touches no state.
#pragma once

#include "csrc/common/parallel.h"
#include "csrc/gated_delta_rule/inputs.h"

namespace jet {

struct RecurrentGatedDeltaRuleCommitParams {
  int64_t N, T, H, Hk, K, V;
  const void* keys;          // [N, T, Hk, K] real, contiguous
  const void* updates;       // [N, T, H, V] real, contiguous
  TokenTensor g;             // [N, T, H], log decay; real on a CPU
  IndexVector num_accepted;  // [N], 0..T; on a device other values count as the nearer bound
  StatePool pool;            // f64 iff real is, else f32 or bf16
};

// As recurrent_gated_delta_rule_cpu and recurrent_gated_delta_rule_hopper.
void recurrent_gated_delta_rule_commit_cpu(const RecurrentGatedDeltaRuleCommitParams& p, const Parallel& parallel);
void recurrent_gated_delta_rule_commit_hopper(const RecurrentGatedDeltaRuleCommitParams& p, void* stream);

}  // namespace jet
