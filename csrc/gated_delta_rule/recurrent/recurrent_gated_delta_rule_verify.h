// Speculative decoding, first half: outputs of T draft tokens, of which some prefix will be accepted. The recurrence is
// that of recurrent_gated_delta_rule.h, but the pool is only read. What the state needs to advance by any prefix is
// written out:
//   keys[n, t, h / (H / Hk)] = k_t, after the l2norm if there is one       updates[n, t, h] = u_t
// recurrent_gated_delta_rule_commit then does S <- exp(g_t) S + k_t u_t^T for the accepted tokens.
#pragma once

#include "csrc/gated_delta_rule/recurrent/recurrent_gated_delta_rule.h"

namespace jet {

struct RecurrentGatedDeltaRuleVerifyParams {
  RecurrentGatedDeltaRuleParams forward;  // forward.pool is not written
  void* keys;                             // [B, T, Hk, K] real, contiguous; zeros where the row is negative
  void* updates;                          // [B, T, H, V] real, contiguous; zeros where the row is negative
};

// As recurrent_gated_delta_rule_cpu and recurrent_gated_delta_rule_hopper.
void recurrent_gated_delta_rule_verify_cpu(const RecurrentGatedDeltaRuleVerifyParams& p, const Parallel& parallel);
void recurrent_gated_delta_rule_verify_hopper(const RecurrentGatedDeltaRuleVerifyParams& p, void* stream);

}  // namespace jet
