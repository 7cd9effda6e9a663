#include "csrc/gated_delta_rule/recurrent_gated_delta_rule_verify.h"

#include "csrc/gated_delta_rule/recurrent_kernel.cuh"

namespace jet {

void recurrent_gated_delta_rule_verify_hopper(const RecurrentGatedDeltaRuleVerifyParams& p, void* stream) {
  hopper::RecurrentArguments a = hopper::recurrent_arguments(p.forward);
  a.keys = static_cast<float*>(p.keys), a.updates = static_cast<float*>(p.updates);
  hopper::launch_recurrent<hopper::RecurrentMode::verify>("recurrent_gated_delta_rule_verify", a, stream);
}

}  // namespace jet
