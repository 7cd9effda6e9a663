// The window of a step's channels on a CPU: states in, products with the taps, states out.
#pragma once

#include "csrc/dynamic_conv/rows_cpu.h"
#include "csrc/dynamic_conv/step/dynamic_conv_step.h"

namespace jet::cpu::JET_CPU_ISA {

// The bits of kLanes<T> elements.
template <class T>
struct LaneBits;
template <>
struct LaneBits<float> {
  using Type = Words;
};
template <>
struct LaneBits<double> {
  using Type = Vector<uint64_t>;
};
template <>
struct LaneBits<bf16> {
  using Type = Halves;
};
template <>
struct LaneBits<f16> {
  using Type = Halves;
};

template <class T>
JET_INLINE typename LaneBits<T>::Type load_bits(const T* p) {
  typename LaneBits<T>::Type x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
template <class T>
JET_INLINE void store_bits(T* p, const typename LaneBits<T>::Type& x) {
  __builtin_memcpy(p, &x, sizeof(x));
}

// to[i] = element from(i) of the K vectors of x, one after the other
template <int K, class V, class From>
JET_INLINE V pick(const V (&x)[K], const From& from) {
  constexpr int L = sizeof(V) / sizeof(x[0][0]);
  typedef decltype(V{} == V{}) Index;
  if constexpr (K == 1) return x[0];
  Index first{}, second{};
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    const int place = from(i);
    first[i] = place < 2 * L ? place : 0;
    second[i] = place < 2 * L ? i : L + place - 2 * L;
  }
  V y = __builtin_shuffle(x[0], x[K > 1 ? 1 : 0], first);
  if constexpr (K == 3) y = __builtin_shuffle(y, x[2], second);
  return y;
}

// inputs[w] of L channels whose state is contiguous, and the state without its oldest input and with x.
template <class T, int W>
JET_INLINE void read_and_shift(const T* x, T* state, T (&inputs)[W][kLanes<T>]) {
  using Bits = typename LaneBits<T>::Type;
  constexpr int L = kLanes<T>, K = W - 1;
  Bits old[K], fresh[K];
#pragma GCC unroll 3
  for (int i = 0; i < K; ++i) old[i] = load_bits(state + i * L);
#pragma GCC unroll 3
  for (int w = 0; w < K; ++w) {
    const Bits tap = pick(old, [&](int c) { return c * K + w; });
    store_bits(inputs[w], tap);
    if (w > 0) fresh[w - 1] = tap;
  }
  fresh[K - 1] = load_bits(x);
  store_bits(inputs[K], fresh[K - 1]);
#pragma GCC unroll 3
  for (int i = 0; i < K; ++i)
    store_bits(state + i * L, pick(fresh, [&](int j) { return (i * L + j) % K * L + (i * L + j) / K; }));
}

template <class T, int W>
JET_INLINE void read_inputs(const T* x, long x_stride, const T* state, long channel, long tap, long n,
                            T (&inputs)[W][kLanes<T>]) {
  for (int w = 0; w < W - 1; ++w)
    for (long c = 0; c < n; ++c) inputs[w][c] = state[c * channel + w * tap];
  for (long c = 0; c < n; ++c) inputs[W - 1][c] = x[c * x_stride];
}

template <class T, int W>
JET_INLINE void shift(T* state, long channel, long tap, long n, const T (&inputs)[W][kLanes<T>]) {
  for (long c = 0; c < n; ++c)
    for (int w = 0; w < W - 1; ++w) state[c * channel + w * tap] = inputs[w + 1][c];
}

// y and the state of sequence `row`, channels [d0, d0 + n). taps[w]: of a channel per lane.
template <class T, int W>
JET_INLINE void convolve_step(const DynamicConvStepParams& p, long row, long d0, long n, const Arithmetic<T>* taps) {
  using Acc = Arithmetic<T>;
  constexpr int L = kLanes<T>;
  T* y = static_cast<T*>(p.y) + row * p.in.D + d0;
  const int64_t s = row_of(p.pool, row);
  if (s < 0) return store_some(y, 1, n, Vector<Acc>{});
  const int64_t x_stride = p.in.x.strides.d;
  const ConvStateStrides& strides = p.pool.strides;
  const T* x = at<T>(p.in.x, row, 0) + d0 * x_stride;
  T* state = static_cast<T*>(p.pool.data) + s * strides.n + d0 * strides.d;
  T inputs[W][L] = {};
  if (n == L && strides.d == W - 1 && strides.w == 1 && x_stride == 1)
    read_and_shift<T, W>(x, state, inputs);
  else
    read_inputs<T, W>(x, x_stride, state, strides.d, strides.w, n, inputs),
        shift<T, W>(state, strides.d, strides.w, n, inputs);
  Vector<Acc> z{};
  for (int w = W - 1; w >= 0; --w) z += Simd<Acc>::load(taps + w * L) * load(inputs[w]);
  store_some(y, 1, n, p.in.silu ? silu(z) : z);
}

}  // namespace jet::cpu::JET_CPU_ISA
