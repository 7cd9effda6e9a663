#include "csrc/linear/tiles_cpu.h"
#include "csrc/linear/vectors_cpu.h"

namespace jet::cpu::JET_CPU_ISA {
namespace {

template <class T>
void run_numbers(const LinearParams& p, const Parallel& parallel) {
  VectorLinear<DenseNumbers<T>, T, false>(p).run(parallel);
}

void run_bf16(const LinearParams& p, const Parallel& parallel) {
#if defined(__AVX512F__)
  if (amx_bf16_is_active() && p.N > 1) return TileLinear<DensePairs, false>(p).run(parallel);
  if (has_bf16_instructions()) return VectorLinear<DensePairs, bf16, false>(p).run(parallel);
#endif
  run_numbers<bf16>(p, parallel);
}

}  // namespace

void linear_cpu(const LinearParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case Dtype::f32: return run_numbers<float>(p, parallel);
    case Dtype::f64: JET_CPU_FP64(run_numbers<double>(p, parallel));
    case Dtype::f16: return run_numbers<f16>(p, parallel);
    case Dtype::bf16: return run_bf16(p, parallel);
  }
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(linear_cpu, LinearParams, params.dtype)
