#include "csrc/gated_delta_rule/recurrent_gated_delta_rule_commit.h"

#include "csrc/gated_delta_rule/recurrent_kernel.cuh"

namespace jet {

void recurrent_gated_delta_rule_commit_hopper(const RecurrentGatedDeltaRuleCommitParams& p, void* stream) {
  hopper::RecurrentArguments a{};
  a.N = p.N, a.T = static_cast<int>(p.T), a.H = p.H, a.Hk = p.Hk, a.K = static_cast<int>(p.K), a.V = static_cast<int>(p.V);
  a.k = hopper::token_tensor(p.keys, Dtype::f32, {p.T * p.Hk * p.K, p.Hk * p.K, p.K, 1});
  a.v = hopper::token_tensor(p.updates, Dtype::f32, {p.T * p.H * p.V, p.H * p.V, p.V, 1});
  a.g = hopper::token_tensor(p.g, p.g_dtype, p.g_strides);
  a.num_accepted = p.num_accepted, a.num_accepted_dtype = p.num_accepted_dtype;
  a.pool = p.pool;
  hopper::launch_recurrent<hopper::RecurrentMode::commit>("recurrent_gated_delta_rule_commit", a, stream);
}

}  // namespace jet
