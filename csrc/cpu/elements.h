// Elements of any dtype as vectors: loads and stores that convert (rounding to nearest even, NaN stays NaN), and e^x.
// Arithmetic is fp32, or fp64 for fp64 elements.
#pragma once

#include "csrc/common/dtype.h"
#include "csrc/cpu/simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace jet::cpu::JET_CPU_ISA {

template <class T>
struct ArithmeticOf {
  using Type = float;
};
template <>
struct ArithmeticOf<double> {
  using Type = double;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::Type;

template <class T>
constexpr int kLanes = Simd<Arithmetic<T>>::lanes;

typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

JET_INLINE void store_halves(void* p, Words w) {
  *static_cast<UnalignedHalves*>(p) = __builtin_convertvector(w, Halves);
}
#if defined(__AVX512F__)  // GCC widens a vector in five instructions, reading it twice
JET_INLINE Words load_halves(const void* p) {
  return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
#elif defined(__AVX2__)
JET_INLINE Words load_halves(const void* p) {
  return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
#else
JET_INLINE Words load_halves(const void* p) {
  return __builtin_convertvector(static_cast<Halves>(*static_cast<const UnalignedHalves*>(p)), Words);
}
#endif

// bf16 bits of x in the lower half of each word
JET_INLINE Words bf16_bits(Floats x) {
  const Words bits = (Words)x;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (x == x) ? rounded : ((bits >> 16) | 0x40);
}

JET_INLINE Floats load(const float* p) { return Simd<float>::load(p); }
JET_INLINE Vector<double> load(const double* p) { return Simd<double>::load(p); }
JET_INLINE Floats load(const bf16* p) { return (Floats)(load_halves(p) << 16); }

JET_INLINE void store(float* p, Floats x) { Simd<float>::store(p, x); }
JET_INLINE void store(double* p, Vector<double> x) { Simd<double>::store(p, x); }
JET_INLINE void store(bf16* p, Floats x) { store_halves(p, bf16_bits(x)); }

#if defined(__AVX512F__)
// bf16 that the CPU itself rounds, where has_bf16_instructions(): one instruction instead of eight, but subnormals
// become zero.
struct NativeBf16 {
  uint16_t bits;
};
JET_INLINE Floats load(const NativeBf16* p) { return (Floats)(load_halves(p) << 16); }
JET_INLINE void store(NativeBf16* p, Floats x) {
  Halves bits;
  asm("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(x));
  *reinterpret_cast<UnalignedHalves*>(p) = bits;
}

JET_INLINE Floats load(const f16* p) {
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
JET_INLINE void store(f16* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
JET_INLINE Floats load(const f16* p) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
JET_INLINE void store(f16* p, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
JET_INLINE Floats load(const f16* p) {
  const Words half = load_halves(p);
  const Words magnitude = half & 0x7fff;
  // Shifting exponent and mantissa into place leaves the exponent 112 too small; a power-of-two product repairs it
  // exactly and normalises subnormals on the way.
  const Words finite = (Words)((Floats)(magnitude << 13) * 0x1p112f);
  const Words special = 0x7f800000 | ((magnitude & 0x3ff) << 13);
  return (Floats)(((half & 0x8000) << 16) | ((Ints)magnitude >= 0x7c00 ? special : finite));
}
JET_INLINE void store(f16* p, Floats x) {
  const Words sign = ((Words)x >> 16) & 0x8000;
  const Words magnitude = (Words)x & 0x7fffffff;
  const Ints order = (Ints)magnitude;
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000;  // the fp32 adder rounds at 2^-24
  Words half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  half = (order < 0x38800000) ? subnormal : half;
  half = (order >= 0x477ff000) ? (Words{} + 0x7c00) : half;  // 65520 and above round to infinity
  half = (order > 0x7f800000) ? (Words{} + 0x7e00) : half;
  store_halves(p, sign | half);
}
#endif

// The first n elements at p, p + stride, ...; zeros in the other lanes.
template <class T>
JET_INLINE Vector<Arithmetic<T>> load_some(const T* p, long stride, long n) {
  if (stride == 1 && n >= kLanes<T>) return load(p);
  T elements[kLanes<T>] = {};
  for (int i = 0; i < kLanes<T>; ++i)
    if (i < n) elements[i] = p[i * stride];
  return load(elements);
}

template <class T>
JET_INLINE void store_some(T* p, long stride, long n, Vector<Arithmetic<T>> x) {
  if (stride == 1 && n >= kLanes<T>) return store(p, x);
  T elements[kLanes<T>];
  store(elements, x);
  for (int i = 0; i < kLanes<T>; ++i)
    if (i < n) p[i * stride] = elements[i];
}

// dst [padded] = n elements at src, src + stride, ..., then zeros. padded: a multiple of kLanes<T>.
template <class T>
inline void load_row(const T* src, long stride, long n, long padded, Arithmetic<T>* dst) {
  constexpr long L = kLanes<T>, piece = 4 * L;
  long i = 0;
  if (stride != 1 && sizeof(T) < sizeof(Arithmetic<T>)) {
    T elements[piece];  // of several vectors, because loading a vector waits for the stores of its elements
    for (; i + piece <= n; i += piece) {
      for (long j = 0; j < piece; ++j) elements[j] = src[(i + j) * stride];
      for (long j = 0; j < piece; j += L) store(dst + i + j, load(elements + j));
    }
  }
#pragma GCC unroll 4
  for (; i + L <= n; i += L) store(dst + i, load_some(src + i * stride, stride, L));
  for (; i < padded; i += L) store(dst + i, load_some(src + i * stride, stride, n - i));
}

// The n elements at dst, dst + stride, ... = src [n]
template <class T>
inline void store_row(const Arithmetic<T>* src, long n, T* dst, long stride = 1) {
  constexpr long L = kLanes<T>;
  long i = 0;
#pragma GCC unroll 4
  for (; i + L <= n; i += L) store_some(dst + i * stride, stride, L, load(src + i));
  if (i < n) store_some(dst + i * stride, stride, n - i, load_some(src + i, 1, n - i));
}

// e^x, relative error below 1.3e-7. Overflows to infinity and keeps NaN; below -86.9 the result is 0 instead of
// subnormal.
JET_INLINE Floats exponential(Floats x) {
  const Floats low = Floats{} - 87.0f, high = Floats{} + 89.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  // x = n ln2 + r: adding 1.5 * 2^23 rounds x / ln2 to the integer n, which stays in the low bits.
  const Floats shifted = x * 1.44269504f + 12582912.0f;
  const Floats n = shifted - 12582912.0f;
  Floats r = x - n * 0.693359375f;  // ln2 in two parts; the first product is exact
  r = r + n * 2.12194440e-4f;
  Floats e = r * (1.0f / 5040) + (1.0f / 720);  // Taylor: |r| <= ln2 / 2 leaves r^8 / 8! < 6e-9
  e = e * r + (1.0f / 120);
  e = e * r + (1.0f / 24);
  e = e * r + (1.0f / 6);
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  const Floats half_scale = (Floats)(((Words)shifted + 126) << 23);  // 2^(n-1): n = 128 must overflow in the product
  return e * half_scale * 2.0f;
}

JET_INLINE Vector<double> exponential(Vector<double> x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace jet::cpu::JET_CPU_ISA
