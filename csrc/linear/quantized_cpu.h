// Who computes linear_int8 and linear_int4 on this CPU, by dtype and number of rows (docs/linear.md).
#pragma once

#include <type_traits>

#include "csrc/linear/integer_tiles_cpu.h"
#include "csrc/linear/tiles_cpu.h"
#include "csrc/linear/vectors_cpu.h"

namespace jet::cpu::JET_CPU_ISA {

// A weight's formats: Numbers<T>, Digits, Bytes, Pairs.
struct Int8Weight {
  template <class T>
  using Numbers = Int8Numbers<T>;
#if defined(__AVX2__)
  template <class D>
  using Digits = Int8Digits<D>;
#endif
#if defined(__AVX512F__)
  using Bytes = Int8Bytes;
  using Pairs = Int8Pairs;
#endif
};

struct Int4Weight {
  template <class T>
  using Numbers = Int4Numbers<T>;
#if defined(__AVX2__)
  template <class D>
  using Digits = Int4Digits<D>;
#endif
#if defined(__AVX512F__)
  using Bytes = Int4Bytes;
  using Pairs = Int4Pairs;
#endif
};

template <class Weight, class T>
void run_numbers(const LinearParams& p, const Parallel& parallel) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Weight, Int4Weight>)
    if (p.C / p.G % Int4WideNumbers<T>::width == 0) return VectorLinear<Int4WideNumbers<T>, T, true>(p).run(parallel);
#endif
  VectorLinear<typename Weight::template Numbers<T>, T, true>(p).run(parallel);
}

// Of 16-bit x.
template <class Weight, class T>
void run_integers(const LinearParams& p, const Parallel& parallel) {
#if defined(__AVX2__)
  using Numbers = typename Weight::template Numbers<T>;
#if defined(__AVX512F__)
  if (amx_int8_is_active() && p.N > 2) return IntegerTileLinear<typename Weight::Bytes, Numbers, T>(p).run(parallel);
  if (has_vnni_instructions()) return IntegerLinear<ByteDigits, Weight::template Digits, Numbers, T>(p).run(parallel);
#endif
  return IntegerLinear<ShortDigits, Weight::template Digits, Numbers, T>(p).run(parallel);
#else
  run_numbers<Weight, T>(p, parallel);
#endif
}

template <class Weight>
void run_quantized(const LinearParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case Dtype::f32: return run_numbers<Weight, float>(p, parallel);
    case Dtype::f64: JET_CPU_FP64(run_numbers<Weight, double>(p, parallel));
    case Dtype::f16: return run_integers<Weight, f16>(p, parallel);
    case Dtype::bf16:
#if defined(__AVX512F__)
      if (amx_bf16_is_active() && p.N > kMostIntegerRows)
        return TileLinear<typename Weight::Pairs, true>(p).run(parallel);
#endif
      return run_integers<Weight, bf16>(p, parallel);
  }
}

}  // namespace jet::cpu::JET_CPU_ISA
