// The recurrent gated delta rule on a CPU: verify without keys and updates, which advances the pool.
#include "csrc/cpu/isa.h"
#include "csrc/gated_delta_rule/recurrent/recurrent_gated_delta_rule_verify.h"

namespace jet::cpu::JET_CPU_ISA {

void recurrent_gated_delta_rule_verify_cpu(const RecurrentGatedDeltaRuleVerifyParams& p, const Parallel& parallel);

void recurrent_gated_delta_rule_cpu(const RecurrentGatedDeltaRuleParams& p, const Parallel& parallel) {
  JET_CPU_ISA::recurrent_gated_delta_rule_verify_cpu({p, nullptr, nullptr}, parallel);
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(recurrent_gated_delta_rule_cpu, RecurrentGatedDeltaRuleParams, params.in.q.dtype)
