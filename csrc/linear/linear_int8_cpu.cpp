#include "csrc/linear/quantized_cpu.h"

namespace jet::cpu::JET_CPU_ISA {

void linear_int8_cpu(const LinearParams& p, const Parallel& parallel) { run_quantized<Int8Weight>(p, parallel); }

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(linear_int8_cpu, LinearParams, params.dtype)
