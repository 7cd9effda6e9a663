#include "csrc/gated_delta_rule/recurrent_gated_delta_rule.h"

#include "csrc/gated_delta_rule/recurrent_kernel.cuh"

namespace jet {

void recurrent_gated_delta_rule_hopper(const RecurrentGatedDeltaRuleParams& p, void* stream) {
  hopper::RecurrentArguments a = hopper::recurrent_arguments(p);
  hopper::launch_recurrent<hopper::RecurrentMode::step>("recurrent_gated_delta_rule", a, stream);
}

}  // namespace jet
