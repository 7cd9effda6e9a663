// What the CPU kernels of the gated delta rule share: elements of tensors, states in stripes, l2norm.
#pragma once

#include "csrc/cpu/elements.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/tasks.h"
#include "csrc/cpu/tensor_access.h"
#include "csrc/gated_delta_rule/inputs.h"

namespace jet::cpu::JET_CPU_ISA {

// Brings the rows that will be loaded next into L2: they lie too far apart for the hardware to foresee them.
template <class In>
JET_INLINE void prefetch_rows(const In* src, const TokenStrides& s, long rows, long n) {
  if (s.d != 1) return;
  for (long i = 0; i < rows; ++i)
    for (long j = 0; j < n; j += 64 / long(sizeof(In))) __builtin_prefetch(src + i * s.t + j, 0, 2);
}

// The same beside other work, some rows of each of a few tensors at a time: a core waits for 16 lines at once, and what
// asks for more of them holds up the work behind it.
class RowsAhead {
 public:
  template <class In>
  void add(const In* src, const TokenStrides& s, long first, long rows, long n, long at_once) {
    if (s.d != 1 || rows <= 0) return;
    tensors_[count_++] = {reinterpret_cast<const char*>(src + first * s.t), s.t * long(sizeof(In)),
                          n * long(sizeof(In)), rows, at_once};
  }

  JET_INLINE void ask() {
    for (int i = 0; i < count_; ++i) {
      Rows& x = tensors_[i];
      for (long some = smaller(x.at_once, x.left); some > 0; --some, --x.left, x.next += x.stride)
        for (long byte = 0; byte < x.bytes; byte += 64) __builtin_prefetch(x.next + byte, 0, 2);
    }
  }

 private:
  struct Rows {
    const char* next;
    long stride, bytes, left, at_once;
  };
  Rows tensors_[4];
  int count_ = 0;
};

template <class T>
JET_INLINE void zero_row(T* row, long n) {
  for (long i = 0; i < n; ++i) row[i] = T(0);
}

// State (n, h) [K, V]; null stays null.
template <class St>
JET_INLINE St* at(St* states, const StateStrides& s, long n, long h) {
  return states == nullptr ? nullptr : states + n * s.n + h * s.h;
}

template <class T>
JET_INLINE const T* at(const StateTensor& states, long n, long h) {
  return at(static_cast<const T*>(states.data), states.strides, n, h);
}

// x [padded], zero from its true length on, <- x / sqrt(sum x^2 + eps); returns the factor
template <class T>
JET_INLINE T normalise(T* x, long padded) {
  using S = Simd<T>;
  typename S::Vec squares{};
  for (long j = 0; j < padded; j += S::lanes) squares += S::load(x + j) * S::load(x + j);
  const T factor = T(1) / T(__builtin_sqrt(horizontal_sum<T>(squares) + T(kL2NormEps)));
  for (long j = 0; j < padded; j += S::lanes) S::store(x + j, S::load(x + j) * factor);
  return factor;
}

// Columns [v0, v0 + columns) of a state into a stripe [K, W], W = Simd<T>::stripe, zero-padded. Null: zeros.
template <class St, class T>
inline void load_state(const St* state, const StateStrides& s, long K, long v0, long columns, T* stripe) {
  constexpr long W = Simd<T>::stripe;
  if (state == nullptr) return zero_row(stripe, K * W);
  for (long i = 0; i < K; ++i) load_row(state + i * s.k + v0 * s.v, s.v, columns, W, stripe + i * W);
}

template <class St, class T>
inline void store_state(const T* stripe, const StateStrides& s, long K, long v0, long columns, St* state) {
  for (long i = 0; i < K; ++i) store_row(stripe + i * Simd<T>::stripe, columns, state + i * s.k + v0 * s.v, s.v);
}

template <class St>
struct StateType {
  using Type = St;
};

// f(StateType) for a pool that is used in fp32
template <class F>
inline void with_fp32_pool(Dtype pool, const F& f) {
  if (pool == Dtype::f32) return f(StateType<float>());
#if defined(__AVX512F__)
  if (has_bf16_instructions()) return f(StateType<NativeBf16>());
#endif
  f(StateType<bf16>());
}

}  // namespace jet::cpu::JET_CPU_ISA
