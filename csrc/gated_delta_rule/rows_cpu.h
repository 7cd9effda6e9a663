// What the CPU kernels of the gated delta rule share: rows and states in any dtype to and from the arithmetic type,
// l2norm, exp, scratch memory, and the distribution of work items.
#pragma once

#include <cstdlib>
#include <new>

#include "csrc/common/cpu/gemm.h"
#include "csrc/common/dtype.h"
#include "csrc/gated_delta_rule/layout.h"

namespace jet::cpu::JET_CPU_ISA {

JET_INLINE void convert(float x, float& y) { y = x; }
JET_INLINE void convert(double x, double& y) { y = x; }
JET_INLINE void convert(bf16 x, float& y) { y = to_float(x); }
JET_INLINE void convert(f16 x, float& y) { y = to_float(x); }
JET_INLINE void convert(float x, bf16& y) { y = to_bf16(x); }
JET_INLINE void convert(float x, f16& y) { y = to_f16(x); }

// dst[i] = src[i * stride] for i < n, in the dtype of dst
template <class Src, class Dst>
inline void load_row(const Src* __restrict src, long stride, long n, Dst* __restrict dst) {
  if (stride == 1)
    for (long i = 0; i < n; ++i) convert(src[i], dst[i]);
  else
    for (long i = 0; i < n; ++i) convert(src[i * stride], dst[i]);
}

// dst[i * stride] = src[i] for i < n, in the dtype of dst
template <class Src, class Dst>
inline void store_row(const Src* __restrict src, long n, Dst* __restrict dst, long stride = 1) {
  if (stride == 1)
    for (long i = 0; i < n; ++i) convert(src[i], dst[i]);
  else
    for (long i = 0; i < n; ++i) convert(src[i], dst[i * stride]);
}

// Brings the rows that will be loaded next into L2: they lie too far apart for the hardware to foresee them.
template <class In>
JET_INLINE void prefetch_rows(const In* src, const TokenStrides& s, long rows, long n) {
  if (s.d != 1) return;
  for (long i = 0; i < rows; ++i)
    for (long j = 0; j < n; j += 64 / long(sizeof(In))) __builtin_prefetch(src + i * s.t + j, 0, 2);
}

template <class T>
JET_INLINE void zero_row(T* row, long n) {
  for (long i = 0; i < n; ++i) row[i] = T(0);
}

template <class T>
JET_INLINE T horizontal_sum(typename Simd<T>::Vec x) {
  T sum = 0;
#pragma GCC unroll 16
  for (int i = 0; i < Simd<T>::lanes; ++i) sum += x[i];
  return sum;
}

// Element (b, t, h, 0) of a tensor of tokens.
template <class T>
JET_INLINE const T* at(const void* data, const TokenStrides& s, long b, long t, long h) {
  return static_cast<const T*>(data) + b * s.b + t * s.t + h * s.h;
}

// State (n, h) [K, V]; null stays null.
template <class St>
JET_INLINE St* at(St* states, const StateStrides& s, long n, long h) {
  return states == nullptr ? nullptr : states + n * s.n + h * s.h;
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
  for (long i = 0; i < K; ++i) {
    load_row(state + i * s.k + v0 * s.v, s.v, columns, stripe + i * W);
    zero_row(stripe + i * W + columns, W - columns);
  }
}

template <class St, class T>
inline void store_state(const T* stripe, const StateStrides& s, long K, long v0, long columns, St* state) {
  for (long i = 0; i < K; ++i) store_row(stripe + i * Simd<T>::stripe, columns, state + i * s.k + v0 * s.v, s.v);
}

// exp to 2 ulp; results below the smallest normal number are zero. NaN stays NaN, overflow gives +inf.
JET_INLINE Simd<float>::Vec exp_vec(Simd<float>::Vec x) {
  using S = Simd<float>;
  typedef decltype(x < x) Bits;
  const S::Vec zero{};
  const Bits tiny = x < -87.33654f, huge = x > 88.72283f;
  x = tiny ? zero : x;
  x = huge ? zero : x;
  // x = n ln 2 + r with |r| <= ln 2 / 2; adding 1.5 2^23 rounds to an integer in the low mantissa bits.
  const S::Vec shifted = x * 1.44269504f + 12582912.0f;
  const S::Vec n = shifted - 12582912.0f;
  const S::Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  S::Vec y = r * 1.3981999e-3f + 8.3334519e-3f;
  y = y * r + 4.1665796e-2f;
  y = y * r + 1.6666657e-1f;
  y = y * r + 0.5f;
  y = y * (r * r) + r + 1.0f;
  // 2^n in two factors, as n = 128 has no normal representation.
  const Bits exponent = (Bits)shifted - 0x4b400000, half = exponent >> 1;
  const Bits first = (half + 127) << 23, second = (exponent - half + 127) << 23;
  y = y * (S::Vec)first * (S::Vec)second;
  y = tiny ? zero : y;
  return huge ? zero + __builtin_inff() : y;
}

JET_INLINE Simd<double>::Vec exp_vec(Simd<double>::Vec x) {
  for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// A 64-byte aligned block of memory, divided among workers and then into arrays.
class Scratch {
 public:
  Scratch(long workers, long bytes) : bytes_(round_up(bytes, 4096) + 64) {
    base_ = static_cast<char*>(std::aligned_alloc(64, round_up(workers * bytes_, 64)));
    if (base_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(base_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* of(long worker) const { return base_ + worker * bytes_; }

 private:
  long bytes_;
  char* base_;
};

// Takes arrays from a block one after the other; with a null block it only counts the bytes.
class Carver {
 public:
  explicit Carver(char* block) : block_(block) {}
  template <class T>
  T* take(long count) {
    T* array = block_ == nullptr ? nullptr : reinterpret_cast<T*>(block_ + used_);
    used_ += round_up(count * long(sizeof(T)), 64);
    return array;
  }
  long used() const { return used_; }

 private:
  char* block_;
  long used_ = 0;
};

// body(item, worker) for every item < items, each worker taking the next item when it is free.
template <class F>
inline void for_each_item(const Parallel& parallel, long items, long workers, const F& body) {
  long next = 0;
  parallel(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (long worker = begin; worker < end; ++worker)
      for (long item; (item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < items;) body(item, worker);
  });
}

// The same for items of equal cost: a worker always gets the same items, so that what it wrote in one call is still in
// its core's cache in the next. Handing items out one by one made decode at batch 8 take 115 us or 320 us, by chance.
template <class F>
inline void for_each_even_item(const Parallel& parallel, long items, long workers, const F& body) {
  parallel(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (long worker = begin; worker < end; ++worker)
      for (long item = items * worker / workers; item < items * (worker + 1) / workers; ++item) body(item, worker);
  });
}

}  // namespace jet::cpu::JET_CPU_ISA
