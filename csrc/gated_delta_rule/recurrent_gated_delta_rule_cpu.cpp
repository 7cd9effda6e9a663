// The recurrent gated delta rule on a CPU.
#include "csrc/gated_delta_rule/recurrent_gated_delta_rule.h"

#include "csrc/common/cpu/isa.h"
#include "csrc/gated_delta_rule/recurrent_item_cpu.h"

namespace jet::cpu::JET_CPU_ISA {

void recurrent_gated_delta_rule_cpu(const RecurrentGatedDeltaRuleParams& p, const Parallel& parallel) {
  recurrent_cpu<false>({p, nullptr, nullptr}, parallel);
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(recurrent_gated_delta_rule_cpu, RecurrentGatedDeltaRuleParams)
