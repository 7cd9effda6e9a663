// Verify on a CPU: the recurrent step that leaves the pool alone and writes k and u out, and the one that does neither.
#include "csrc/gated_delta_rule/recurrent/recurrent_gated_delta_rule_verify.h"

#include "csrc/cpu/isa.h"
#include "csrc/gated_delta_rule/recurrent_item_cpu.h"

namespace jet::cpu::JET_CPU_ISA {

void recurrent_gated_delta_rule_verify_cpu(const RecurrentGatedDeltaRuleVerifyParams& p, const Parallel& parallel) {
  recurrent_cpu(p, parallel);
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(recurrent_gated_delta_rule_verify_cpu, RecurrentGatedDeltaRuleVerifyParams, params.forward.in.q.dtype)
