// How W lies in memory, and what one step of the inner loop multiplies:
//
//   Weight    an element in memory, of `per_weight` columns; row_at(row, c): where column c is
//   Unit      what a lane of an operand holds: a number, or a pair of bf16
//   width     columns of a step, in `vectors` vectors of units
//   load(w, n, units)        the first n columns at w, zeros after them
//   pack(x, stride, n, units)  the same columns of x, in the same order
#pragma once

#include "csrc/cpu/elements.h"

namespace jet::cpu::JET_CPU_ISA {

// Integers as fp32 or fp64, zeros after the first n.
template <class Acc>
JET_INLINE Vector<Acc> widen_some(const int8_t* p, long n) {
  constexpr int L = Simd<Acc>::lanes;
#if defined(__AVX512F__)  // GCC widens the vector piece by piece
  if constexpr (L == 16) {
    const __m128i bytes =
        n >= L ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)) : _mm_maskz_loadu_epi8((1u << n) - 1, p);
    return __builtin_convertvector((Ints)_mm512_maskz_cvtepi8_epi32(0xffff, bytes), Floats);
  }
#elif defined(__AVX2__)
  if constexpr (L == 8) {
    int64_t eight = 0;
    __builtin_memcpy(&eight, p, n >= L ? L : n);
    return __builtin_convertvector((Ints)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(eight)), Floats);
  }
#endif
  typedef int8_t Bytes __attribute__((vector_size(L)));
  Bytes bytes{};
  __builtin_memcpy(&bytes, p, n >= L ? L : n);
  return __builtin_convertvector(bytes, Vector<Acc>);
}

// Numbers of x, a vector to a step.
template <class T>
struct NumbersOfX {
  using Unit = Arithmetic<T>;
  using Units = Vector<Unit>;
  static constexpr int vectors = 1;
  static constexpr long width = kLanes<T>;

  static JET_INLINE void pack(const T* x, long stride, long n, Unit* units) {
    Simd<Unit>::store(units, load_some(x, stride, n));
  }
};

template <class T>
struct DenseNumbers : NumbersOfX<T> {
  using Weight = T;
  static constexpr long per_weight = 1;
  using typename NumbersOfX<T>::Units;
  static JET_INLINE const T* row_at(const T* row, long c) { return row + c; }
  static JET_INLINE void load(const T* w, long n, Units (&units)[1]) { units[0] = load_some(w, 1, n); }
};

template <class T>
struct Int8Numbers : NumbersOfX<T> {
  using Weight = int8_t;
  static constexpr long per_weight = 1;
  using typename NumbersOfX<T>::Units;
  static JET_INLINE const int8_t* row_at(const int8_t* row, long c) { return row + c; }
  static JET_INLINE void load(const int8_t* w, long n, Units (&units)[1]) {
    units[0] = widen_some<Arithmetic<T>>(w, n);
  }
};

// Even columns in one vector, odd ones in the next.
template <class T>
struct Int4Numbers {
  using Weight = uint8_t;
  static constexpr long per_weight = 2;
  using Unit = Arithmetic<T>;
  using Units = Vector<Unit>;
  static constexpr int vectors = 2;
  static constexpr long width = 2 * kLanes<T>;

  static JET_INLINE const uint8_t* row_at(const uint8_t* row, long c) { return row + c / 2; }

  static JET_INLINE void load(const uint8_t* w, long n, Units (&units)[2]) {
    constexpr int L = kLanes<T>;
    typedef uint8_t Bytes __attribute__((vector_size(L)));
    typedef int8_t Signed __attribute__((vector_size(L)));
    Bytes bytes = Bytes{} + 0x88;  // zeros
    __builtin_memcpy(&bytes, w, n >= width ? L : n / 2);
    units[0] = __builtin_convertvector((Signed)(bytes & 15) - 8, Units);
    units[1] = __builtin_convertvector((Signed)(bytes >> 4) - 8, Units);
  }

  static JET_INLINE void pack(const T* x, long stride, long n, Unit* units) {
    Simd<Unit>::store(units, load_some(x, 2 * stride, (n + 1) / 2));
    Simd<Unit>::store(units + kLanes<T>, load_some(x + stride, 2 * stride, n / 2));
  }
};

#if defined(__AVX512F__)

// Pairs of neighbouring columns in bf16, 32 columns to a step: for the instructions of AVX512-BF16 and AMX.
struct PairsOfX {
  using Unit = uint32_t;
  using Units = Words;
  static constexpr int vectors = 1;
  static constexpr long width = 2 * Simd<Unit>::lanes;

  static JET_INLINE Units load_pairs(const bf16* p, long stride, long n) {
    typedef Unit UnalignedPairs __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
    if (stride == 1 && n >= width) return *reinterpret_cast<const UnalignedPairs*>(p);
    alignas(64) uint16_t elements[width] = {};
    for (long i = 0; i < width; ++i)
      if (i < n) elements[i] = p[i * stride].bits;
    Units units;
    __builtin_memcpy(&units, elements, sizeof(units));
    return units;
  }

  static JET_INLINE void pack(const bf16* x, long stride, long n, Unit* units) {
    Simd<Unit>::store(units, load_pairs(x, stride, n));
  }
};

struct DensePairs : PairsOfX {
  using Weight = bf16;
  static constexpr long per_weight = 1;
  static JET_INLINE const bf16* row_at(const bf16* row, long c) { return row + c; }
  static JET_INLINE void load(const bf16* w, long n, Units (&units)[1]) { units[0] = load_pairs(w, 1, n); }
};

// Every int8 is a bf16.
struct Int8Pairs : PairsOfX {
  using Weight = int8_t;
  static constexpr long per_weight = 1;
  static JET_INLINE const int8_t* row_at(const int8_t* row, long c) { return row + c; }
  static JET_INLINE void load(const int8_t* w, long n, Units (&units)[1]) {
    __m256i bytes{};
    if (n >= width)
      bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    else
      bytes = _mm256_maskz_loadu_epi8((1u << n) - 1, w);
    const Floats low = numbers(_mm256_castsi256_si128(bytes));
    const Floats high = numbers(_mm256_extracti128_si256(bytes, 1));
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(units[0]) : "v"(low), "v"(high));
  }

 private:
  static JET_INLINE Floats numbers(__m128i bytes) {
    return __builtin_convertvector((Ints)_mm512_maskz_cvtepi8_epi32(0xffff, bytes), Floats);
  }
};

// -8 .. 7 as bf16, twice.
JET_INLINE __m512i int4_table() {
  typedef uint16_t Bf16s __attribute__((vector_size(64)));
  constexpr Bf16s table = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,  // -8 .. -1
                           0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,  // 0 .. 7
                           0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,  // and again
                           0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
  return (__m512i)table;
}

// The table's numbers of the lowest four bits of each 16-bit number: it is read by five bits, the fifth does not
// matter.
JET_INLINE Words int4_numbers(Words halves) {
  return (Words)_mm512_maskz_permutexvar_epi16(~0u, (__m512i)halves, int4_table());
}

struct Int4Pairs : PairsOfX {
  using Weight = uint8_t;
  static constexpr long per_weight = 2;
  static JET_INLINE const uint8_t* row_at(const uint8_t* row, long c) { return row + c / 2; }
  static JET_INLINE void load(const uint8_t* w, long n, Units (&units)[1]) {
    const __m128i bytes = n >= width ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(w))
                                     : _mm_mask_loadu_epi8(_mm_set1_epi8(int8_t(0x88)), (1u << n / 2) - 1, w);
    // the low half of a byte to the lowest bits of one 16-bit number, the high half to those of the next
    const Words byte = (Words)_mm512_maskz_cvtepu8_epi32(0xffff, bytes);
    units[0] = int4_numbers(byte | byte << 12);
  }
};

// 128 columns to a step: vector v has columns v, v + 8, .., v + 120, which are 4 v bits up in the words of W.
template <class T>
struct Int4WideNumbers {
  using Weight = uint8_t;
  static constexpr long per_weight = 2;
  using Unit = float;
  using Units = Floats;
  static constexpr int vectors = 8;
  static constexpr long width = 128;

  static JET_INLINE const uint8_t* row_at(const uint8_t* row, long c) { return row + c / 2; }
  static JET_INLINE void load(const uint8_t* w, long n, Units (&units)[8]) {
    constexpr Floats table = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    const Words words =
        (Words)(n >= width ? _mm512_loadu_si512(w)
                           : _mm512_mask_loadu_epi8(_mm512_set1_epi8(int8_t(0x88)), (uint64_t{1} << n / 2) - 1, w));
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v)  // a permutation reads the lowest four bits of a word
      units[v] = (Floats)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)(words >> 4 * v), (__m512)table);
  }
  static JET_INLINE void pack(const T* x, long stride, long n, Unit* units) {
    for (int v = 0; v < vectors; ++v)
      Simd<float>::store(units + v * kLanes<T>, load_some(x + v * stride, 8 * stride, (n - v + 7) / 8));
  }
};

#endif

}  // namespace jet::cpu::JET_CPU_ISA
