// Activations of vectors, in the precision of the arithmetic. NaN stays NaN.
#pragma once

#include "csrc/cpu/elements.h"

namespace jet::cpu::JET_CPU_ISA {

template <class V>
JET_INLINE V sigmoid(V z) {
  return 1 / (exponential(-z) + 1);
}

template <class V>
JET_INLINE V silu(V z) {
  return z / (exponential(-z) + 1);
}

// d silu(z) / dz
template <class V>
JET_INLINE V silu_slope(V z) {
  const V s = sigmoid(z);
  return s * (1 + z * (1 - s));
}

// log(1 + u) for u in [0, 1], relative error below 2e-7, also of tiny u: 2 atanh(s) with s = u / (2 + u) <= 1/3.
JET_INLINE Floats log1p_of_fraction(Floats u) {
  const Floats s = u / (2 + u), q = s * s;
  Floats sum = q * (1.0f / 13) + (1.0f / 11);  // Taylor: q <= 1/9 leaves q^7 / 15 < 2e-8
  sum = sum * q + (1.0f / 9);
  sum = sum * q + (1.0f / 7);
  sum = sum * q + (1.0f / 5);
  sum = sum * q + (1.0f / 3);
  sum = sum * q + 1.0f;
  return 2 * s * sum;
}

JET_INLINE Vector<double> log1p_of_fraction(Vector<double> u) {
  for (int i = 0; i < Simd<double>::lanes; ++i) u[i] = __builtin_log1p(u[i]);
  return u;
}

// log(1 + e^z), which is z for a large z and e^z for a very negative one: no exponent here is positive.
template <class V>
JET_INLINE V softplus(V z) {
  const V zero{};
  return (z > 0 ? z : zero) + log1p_of_fraction(exponential(z > 0 ? -z : z));
}

}  // namespace jet::cpu::JET_CPU_ISA
