// Vectors of channels: loads and stores that convert, and SiLU. Arithmetic is fp32, or fp64 for fp64 elements.
// Conversions are written on vectors (not with common/dtype.h's scalar functions), so that no inline function is shared
// between instruction sets.
#pragma once

#include "csrc/common/cpu/gemm.h"
#include "csrc/common/dtype.h"

#if defined(__AVX512F__) || defined(__F16C__)
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

template <class A>
using Vector = typename Simd<A>::Vec;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t UnalignedHalves __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

JET_INLINE Words load_halves(const void* p) {
  return __builtin_convertvector(static_cast<Halves>(*static_cast<const UnalignedHalves*>(p)), Words);
}
JET_INLINE void store_halves(void* p, Words w) { *static_cast<UnalignedHalves*>(p) = __builtin_convertvector(w, Halves); }

// bf16 bits of x in the lower half of each word, rounded to nearest even; NaN stays NaN.
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
JET_INLINE Floats load(const f16* p) {
  return (Floats)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
JET_INLINE void store(f16* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, (__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
JET_INLINE Floats load(const f16* p) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
JET_INLINE void store(f16* p, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
// The same steps as to_float(f16) and to_f16(float) in common/dtype.h.
JET_INLINE Floats load(const f16* p) {
  const Words half = load_halves(p);
  const Words magnitude = half & 0x7fff;
  const Words finite = (Words)((Floats)(magnitude << 13) * 0x1p112f);
  const Words special = 0x7f800000 | ((magnitude & 0x3ff) << 13);
  return (Floats)(((half & 0x8000) << 16) | ((Ints)magnitude >= 0x7c00 ? special : finite));
}
JET_INLINE void store(f16* p, Floats x) {
  const Words sign = ((Words)x >> 16) & 0x8000;
  const Words magnitude = (Words)x & 0x7fffffff;
  const Ints order = (Ints)magnitude;
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000;
  Words half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  half = (order < 0x38800000) ? subnormal : half;
  half = (order >= 0x477ff000) ? (Words{} + 0x7c00) : half;
  half = (order > 0x7f800000) ? (Words{} + 0x7e00) : half;
  store_halves(p, sign | half);
}
#endif

// The first n elements at p, p + stride, ...; zeros in the other lanes.
template <class T>
JET_INLINE Vector<Arithmetic<T>> load_some(const T* p, long stride, long n) {
  if (stride == 1 && n >= kLanes<T>) return load(p);
  T elements[kLanes<T>] = {};
  for (long i = 0; i < n && i < kLanes<T>; ++i) elements[i] = p[i * stride];
  return load(elements);
}

template <class T>
JET_INLINE void store_some(T* p, long stride, long n, Vector<Arithmetic<T>> x) {
  if (stride == 1 && n >= kLanes<T>) return store(p, x);
  T elements[kLanes<T>];
  store(elements, x);
  for (long i = 0; i < n && i < kLanes<T>; ++i) p[i * stride] = elements[i];
}

// e^x, relative error below 2e-7. Overflows to infinity and keeps NaN; below -86.9 the result is 0 instead of subnormal.
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

template <class V>
JET_INLINE V silu(V z) {
  return z / (exponential(-z) + 1);
}

// d silu(z) / dz
template <class V>
JET_INLINE V silu_slope(V z) {
  const V s = 1 / (exponential(-z) + 1);
  return s * (1 + z * (1 - s));
}

}  // namespace jet::cpu::JET_CPU_ISA
