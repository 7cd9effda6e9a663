// The norm of one row.
#pragma once

#include "csrc/cpu/activations.h"
#include "csrc/cpu/elements.h"

namespace jet::cpu::JET_CPU_ISA {

// The sum of the lanes, by halves: a chain of log2(lanes) additions where horizontal_sum has one of all lanes.
template <class T>
JET_INLINE T sum_by_halves(Vector<T> x) {
  T lanes[Simd<T>::lanes];
  Simd<T>::store(lanes, x);
#pragma GCC unroll 4
  for (int half = Simd<T>::lanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// f(c, n) for each vector of columns: its first, and how many it has of a row of C.
template <int L, class F>
JET_INLINE void for_vectors(long C, const F& f) {
  long c = 0;
  for (; c + L <= C; c += L) f(c, long{L});
  if (c < C) f(c, C - c);
}

// 1 / sqrt(squares / C + eps)
JET_INLINE float inverse_rms(float squares, long C, double eps) {
  return 1 / __builtin_sqrtf(squares / float(C) + float(eps));
}
JET_INLINE double inverse_rms(double squares, long C, double eps) {
  return 1 / __builtin_sqrt(squares / double(C) + eps);
}

// The sum of squares of x [C]. Four chains, so that an addition need not wait for the one before.
template <class T>
JET_INLINE Arithmetic<T> sum_of_squares(const T* x, long C) {
  constexpr long L = kLanes<T>;
  Vector<Arithmetic<T>> sums[4] = {};
  long c = 0;
  for (; c + 4 * L <= C; c += 4 * L)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto v = load(x + c + i * L);
      sums[i] += v * v;
    }
  for (; c < C; c += L) {
    const auto v = load_some(x + c, 1, C - c);
    sums[0] += v * v;
  }
  return sum_by_halves<Arithmetic<T>>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// y [C] = x r(x) weight, with a gate times silu(gate). T: of x, gate and y; W: of the weight.
template <class T, class W>
JET_INLINE void norm_row(const T* x, const W* weight, long C, double eps, T* y) {
  const auto r = inverse_rms(sum_of_squares(x, C), C, eps);
  for_vectors<kLanes<T>>(C, [&](long c, long n) JET_INLINE_LAMBDA {
    store_some(y + c, 1, n, load_some(x + c, 1, n) * r * load_some(weight + c, 1, n));
  });
}
template <class T, class W>
JET_INLINE void gated_norm_row(const T* x, const T* gate, const W* weight, long C, double eps, T* y) {
  const auto r = inverse_rms(sum_of_squares(x, C), C, eps);
  for_vectors<kLanes<T>>(C, [&](long c, long n) JET_INLINE_LAMBDA {
    const auto normed = load_some(x + c, 1, n) * r * load_some(weight + c, 1, n);
    store_some(y + c, 1, n, normed * silu(load_some(gate + c, 1, n)));
  });
}

// sum [C] = x + residual, rounded
template <class T>
JET_INLINE void add_row(const T* x, const T* residual, long C, T* sum) {
  for_vectors<kLanes<T>>(C, [&](long c, long n) JET_INLINE_LAMBDA {
    store_some(sum + c, 1, n, load_some(x + c, 1, n) + load_some(residual + c, 1, n));
  });
}

}  // namespace jet::cpu::JET_CPU_ISA
