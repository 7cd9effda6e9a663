// The generator's GEMM on a CPU: operands are packed so that one step of the inner loop reads consecutive memory, and
// results stay in a register tile of kAccumulators vectors, where the convolution is the epilogue.
//
// A `Product` says what one step multiplies. Its Unit is what one lane of an operand holds: a number (PlainProduct), or
// a pair of consecutive bf16 along the summed dimension (Bf16Product, the AVX512-BF16 instruction).
#pragma once

#include "csrc/cpu/elements.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/isa.h"
#include "csrc/dynamic_conv/inputs.h"

namespace jet::cpu::JET_CPU_ISA {

template <class A>
struct PlainProduct {
  using Acc = A;
  using Unit = A;
  using Units = Vector<A>;
  using Number = A;                // what units are made of
  static constexpr int terms = 1;  // numbers in a unit

  // Units from `n` elements at p, p + stride, ...
  template <class T>
  static JET_INLINE Units load_units(const T* p, long stride, long n) {
    return load_some(p, stride, n);
  }

  // Units whose number i comes from rows[i], each `n` elements at a distance of `stride`; a null row holds zeros.
  template <class T>
  static JET_INLINE Units combine(const T* const (&rows)[terms], long stride, long n) {
    return rows[0] ? load_some(rows[0], stride, n) : Units{};
  }
};

#if defined(__AVX512F__)
struct Bf16Product {
  using Acc = float;
  using Unit = uint32_t;
  using Units = Words;
  using Number = bf16;
  static constexpr int terms = 2;

  static JET_INLINE Units load_units(const bf16* p, long stride, long n) {
    typedef Unit UnalignedPairs __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
    if (stride == 1 && n >= 2 * Simd<Unit>::lanes) return *reinterpret_cast<const UnalignedPairs*>(p);
    alignas(64) uint16_t elements[2 * Simd<Unit>::lanes] = {};
    for (long i = 0; i < n && i < 2 * Simd<Unit>::lanes; ++i) elements[i] = p[i * stride].bits;
    Units units;
    __builtin_memcpy(&units, elements, sizeof(units));
    return units;
  }

  static JET_INLINE Units combine(const bf16* const (&rows)[terms], long stride, long n) {
    const Words low = rows[0] ? (Words)load_some(rows[0], stride, n) : Words{};
    const Words high = rows[1] ? (Words)load_some(rows[1], stride, n) : Words{};
    return (low >> 16) | high;
  }
};
#endif

template <class Product_, class Element_>
struct ProductTypes {
  using Product = Product_;
  using Element = Element_;
};

// f(ProductTypes<..>(), std::integral_constant<int, W>()) for the dtype and the number of taps of a call. `round_bf16`:
// whether it may round to bf16 what it multiplies with bf16, where the CPU has the instruction.
template <class F>
void with_product(const ConvInputs& in, [[maybe_unused]] bool round_bf16, const F& f) {
  with_taps(in.W, [&](auto taps) {
    switch (in.x.dtype) {
      case Dtype::f32: return f(ProductTypes<PlainProduct<float>, float>(), taps);
      case Dtype::f64: JET_CPU_FP64(f(ProductTypes<PlainProduct<double>, double>(), taps));
      case Dtype::f16: return f(ProductTypes<PlainProduct<float>, f16>(), taps);
      case Dtype::bf16:
#if defined(__AVX512F__)
        if (round_bf16 && has_bf16_instructions()) return f(ProductTypes<Bf16Product, bf16>(), taps);
#endif
        return f(ProductTypes<PlainProduct<float>, bf16>(), taps);
    }
  });
}

constexpr double kCopy = 4;  // multiply-adds that take the time of copying a number

// Multiply-adds of a forward: the GEMM, and the convolution with its loads.
inline double conv_work(const ConvInputs& in, const TapGenerator& generator) {
  return double(in.B * in.T) * in.D * in.W * (generator.R + kCopy) + kCopy * in.N * in.D * in.W;
}

constexpr long units_for(long numbers, int terms) { return (numbers + terms - 1) / terms; }

// panel[step][w][channel] = unit `step` of row (d0 + channel) * W + w of weight [D*W, R]: vector w holds tap w of one
// channel per lane, so a convolution needs no shuffle. Rows of channels >= n are zero.
template <class P, class T, int W>
void pack_weight_panel(const T* weight, long R, long d0, long n, typename P::Unit* panel) {
  using S = Simd<typename P::Unit>;
  constexpr int L = S::lanes;
  const long steps = units_for(R, P::terms);
  const T* rows = weight + d0 * W * R;
  for (long i = 0; i < n * W * R; i += 64 / long(sizeof(T)))
    __builtin_prefetch(rows + i);  // read below in short pieces
  for (int w = 0; w < W; ++w)
    for (long s = 0; s < steps; s += L) {
      const long r = s * P::terms;
      typename P::Units x[L];
      if (n == L && R - r >= L * P::terms) {
#pragma GCC unroll 16
        for (int c = 0; c < L; ++c) x[c] = P::load_units(rows + (c * W + w) * R + r, 1, L * P::terms);
      } else {
        for (int c = 0; c < L; ++c)
          x[c] = c < n ? P::load_units(rows + (c * W + w) * R + r, 1, R - r) : typename P::Units{};
      }
      transpose_in_registers(x);
      if (s + L <= steps) {
#pragma GCC unroll 16
        for (int j = 0; j < L; ++j) S::store(panel + ((s + j) * W + w) * L, x[j]);
      } else {
        for (int j = 0; s + j < steps; ++j) S::store(panel + ((s + j) * W + w) * L, x[j]);
      }
    }
}

// bias[w][channel] of the same panel.
template <class T, int W>
void pack_bias_panel(const T* bias, long d0, long n, Arithmetic<T>* panel) {
  constexpr int L = kLanes<T>;
  for (int w = 0; w < W; ++w)
    Simd<Arithmetic<T>>::store(panel + w * L, bias ? load_some(bias + d0 * W + w, W, n) : Vector<Arithmetic<T>>{});
}

// tile[step][i] = unit `step` of row i, for one row of a tile of M rows.
template <class P, class T>
void pack_tile_row(const T* row, long stride, long R, long i, long M, typename P::Unit* tile) {
  using S = Simd<typename P::Unit>;
  const long steps = units_for(R, P::terms);
  alignas(64) typename P::Unit units[S::lanes];
  for (long s = 0; s < steps; s += S::lanes) {
    const long r = s * P::terms;
    S::store(units, P::load_units(row + r * stride, stride, R - r));
    for (long j = 0; j < S::lanes && s + j < steps; ++j) tile[(s + j) * M + i] = units[j];
  }
}

}  // namespace jet::cpu::JET_CPU_ISA
