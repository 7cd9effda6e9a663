#include "csrc/gated_delta_rule/recurrent_gated_delta_rule_commit.h"

#include "csrc/gated_delta_rule/recurrent_kernel.cuh"

namespace jet {

void recurrent_gated_delta_rule_commit_hopper(const RecurrentGatedDeltaRuleCommitParams& p, void* stream) {
  hopper::RecurrentArguments a{};
  a.g_dtype = p.g_dtype, a.g = p.g, a.g_strides = p.g_strides;
  a.T = p.T, a.H = p.H, a.Hk = p.Hk, a.K = static_cast<int>(p.K), a.V = static_cast<int>(p.V);
  a.keys = static_cast<float*>(const_cast<void*>(p.keys)), a.updates = static_cast<float*>(const_cast<void*>(p.updates));
  a.num_accepted = p.num_accepted, a.num_accepted_dtype = p.num_accepted_dtype;
  a.pool = p.pool;
  hopper::launch_recurrent<hopper::RecurrentMode::commit>("recurrent_gated_delta_rule_commit", a, p.N, stream);
}

}  // namespace jet
