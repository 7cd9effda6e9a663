// Which calls the Hopper kernels of jet_block_step take; the others are served by the plain path.
#pragma once

#include "csrc/dynamic_conv/kernel_takes.h"
#include "csrc/gated_delta_rule/recurrent/kernel_takes.h"
#include "csrc/jet_block_step/jet_block_step.h"

namespace jet {

inline bool jet_block_step_kernel_takes(const JetBlockStepParams& p) {
  const RecurrentGatedDeltaRuleParams& recurrent = p.recurrent;
  return dynamic_conv_step_kernel_takes(p.conv.in, p.conv.generator, p.conv.pool) &&
         recurrent_kernel_takes(recurrent.in.K, recurrent.in.V, recurrent.pool);
}

}  // namespace jet
