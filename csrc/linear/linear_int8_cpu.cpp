#include "csrc/linear/integer_tiles_cpu.h"
#include "csrc/linear/tiles_cpu.h"
#include "csrc/linear/vectors_cpu.h"

namespace jet::cpu::JET_CPU_ISA {
namespace {

template <class T>
void run_numbers(const LinearParams& p, const Parallel& parallel) {
  VectorLinear<Int8Numbers<T>, T, true>(p).run(parallel);
}

// Of 16-bit x.
template <class T>
void run_integers(const LinearParams& p, const Parallel& parallel) {
#if defined(__AVX512F__)
  if (amx_int8_is_active() && p.N > 2) return IntegerTileLinear<Int8Bytes, Int8Numbers<T>, T>(p).run(parallel);
  if (has_vnni_instructions()) return IntegerLinear<ByteDigits, Int8Digits, Int8Numbers<T>, T>(p).run(parallel);
#endif
#if defined(__AVX2__)
  return IntegerLinear<ShortDigits, Int8Digits, Int8Numbers<T>, T>(p).run(parallel);
#else
  run_numbers<T>(p, parallel);
#endif
}

void run_bf16(const LinearParams& p, const Parallel& parallel) {
#if defined(__AVX512F__)
  if (amx_bf16_is_active() && p.N > kMostIntegerRows) return TileLinear<Int8Pairs, true>(p).run(parallel);
#endif
  run_integers<bf16>(p, parallel);
}

}  // namespace

void linear_int8_cpu(const LinearParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case Dtype::f32: return run_numbers<float>(p, parallel);
    case Dtype::f64: JET_CPU_FP64(run_numbers<double>(p, parallel));
    case Dtype::f16: return run_integers<f16>(p, parallel);
    case Dtype::bf16: return run_bf16(p, parallel);
  }
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(linear_int8_cpu, LinearParams, params.dtype)
