// The products of a chunk with the state and with U in the tile registers of AMX (csrc/cpu/amx.h). A matrix of fp32
// goes in as two of bf16, X = hi + lo, and a product is three:
//
//   A B = A_hi B_hi + A_hi B_lo + A_lo B_hi
//
// What is left out is below 2^-16 of the terms. Left operands are rows of K, Q, K^T and P as they are; right operands,
// the state and U, become pairs of rows. Products in tiles add zeros times what lies beside a triangle, and hi + lo has
// no infinity: what is not finite is left to the code that computes with numbers. Tiles take and give subnormal numbers
// as zero: a stripe whose numbers are all below 1e-33 loses digits.
#pragma once

#include "csrc/cpu/amx.h"
#include "csrc/gated_delta_rule/chunk/stages_cpu.h"

#if defined(__AVX512F__)

namespace jet::cpu::JET_CPU_ISA {

// [rows, columns] in fp32 as hi and lo. As a left operand rows of bf16; as a right one tiles of 32 rows x 16 columns,
// [rows / 32][columns / 16][16 pairs of rows][16 columns].
struct SplitMatrix {
  uint16_t *hi, *lo;

  void carve(Carver& from, long numbers) { hi = from.take<uint16_t>(numbers), lo = from.take<uint16_t>(numbers); }
};

class ChunkTiles {
  static constexpr long W = Simd<float>::stripe, L = Simd<float>::lanes;
  static constexpr long kPair = 2 * kTileSide;                    // rows or columns of two tiles side by side
  static constexpr long kRightTile = kTileNumbers;                // numbers
  static constexpr long kRightStep = W / kTileSide * kRightTile;  // of 32 rows
  static_assert(C % kPair == 0 && W % kPair == 0 && kTileColumns == kPair);

 public:
  using Registers = WholeTiles;  // while `run` is called

  // Whether tiles serve a call, and a chunk of so many tokens with so many whole stripes. Factors far from one would
  // make numbers of operands that are subnormal.
  static bool take(const GatedDeltaRuleInputs& in) {
    const double scale = __builtin_fabs(in.scale);
    return in.K > 0 && in.K % kPair == 0 && 1e-15 < scale && scale < 1e15;
  }
  static bool take(long tokens, long whole_stripes) { return whole_stripes > 0 && tokens > C / 2; }

  void carve(Carver& from, long K) {
    K_ = K;
    k_.carve(from, C * K), q_.carve(from, C * K), kt_.carve(from, K * C), p_.carve(from, C * C);
    state_.carve(from, K * W), u_.carve(from, C * W);
  }

  // The left operands of a chunk whose factors are folded in. Only rows < L of qk are set.
  void load(const Chunk<float>& c) {
    split_rows(c.k, c.ld, C, K_, k_), split_rows(c.q, c.ld, C, K_, q_), split_rows(c.kt, C, K_, C, kt_);
    split_rows(c.qk, C, c.L, C, p_);
    for (uint16_t* half : {p_.hi, p_.lo}) __builtin_memset(half + c.L * C, 0, (C - c.L) * C * sizeof(*half));
  }

  // chunk_stripe of a whole stripe; asks for `ahead` meanwhile. Where something is not finite, only rows of o before
  // it, as they would be with anything else behind them, and the state stays as it is. Returns the number of rows.
  long run(const Chunk<float>& c, float* state, float* u, float* o, RowsAhead& ahead) const {
    if (!pair_rows(state, K_, state_)) return 0;
    zero_row(u + c.L * W, (C - c.L) * W);
    // U = (I + diag(beta) kk)^-1 (diag(beta) V - diag(beta e^c) K S0)
    for_tiles(C, [&](long i, long j) {
      load_sums(u + i * W + j);
      multiply(k_, i, K_, state_, j, K_ / kPair, ahead);
      store_sums(u + i * W + j);
    });
    for_row_blocks(0, c.L, [&](auto rows, long i) {
      Tile<float, decltype(rows)::value, kTileVectors> tile;
      tile.load(u + i * W, W);
      tile.add_product(c.kk + i * C, C, 1, u, W, i);
      tile.solve_lower(c.kk + i * C + i, C, 1);
      tile.store(u + i * W, W);
    });
    long rows = c.L;
    if (!pair_rows(u, C, u_)) {
      rows = finite_rows(u);
      zero_row(u + rows * W, (C - rows) * W);
      pair_rows(u, C, u_);
    }
    // O = scale diag(e^c) Q S0 + P U
    for_tiles(C, [&](long i, long j) {
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      multiply(q_, i, K_, state_, j, K_ / kPair, ahead);
      multiply(p_, i, C, u_, j, i / kPair + 1, ahead);
      store_sums(o + i * W + j);
    });
    if (rows < c.L) return rows;
    // S1 = e^{c_L} S0 + K^T diag(e^{c_L - c}) U
    for (long i = 0; i < K_ * W; i += L)
      Simd<float>::store(state + i, Simd<float>::load(state + i) * Simd<float>::all(c.e_last));
    for_tiles(K_, [&](long i, long j) {
      load_sums(state + i * W + j);
      multiply(kt_, i, C, u_, j, C / kPair, ahead);
      store_sums(state + i * W + j);
    });
    return rows;
  }

 private:
  // x rounded to bf16, in the upper halves of the words. What would be rounded to infinity, and what is not finite, is
  // cut off instead: rounding would carry a NaN into the sign.
  static JET_INLINE Words upper(Floats x) {
    const Words rounded = (Words)x + 0x8000u;
    return ((Ints)((Words)x & 0x7fffffffu) < 0x7f7f8000 ? rounded : (Words)x) & 0xffff0000u;
  }

  // 32 numbers
  static JET_INLINE void split(const float* x, uint16_t* hi, uint16_t* lo) {
    const Floats a = Simd<float>::load(x), b = Simd<float>::load(x + L);
    const Words a_hi = upper(a), b_hi = upper(b);
    store_uppers(hi, a_hi, b_hi);
    store_uppers(lo, upper(a - (Floats)a_hi), upper(b - (Floats)b_hi));
  }

  static JET_INLINE void store_uppers(uint16_t* to, Words a, Words b) {
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25,
                                         23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16((__m512i)a, odd, (__m512i)b));
  }

  static void split_rows(const float* x, long ldx, long rows, long columns, const SplitMatrix& to) {
    for (long i = 0; i < rows; ++i)
      for (long j = 0; j < columns; j += kPair)
        split(x + i * ldx + j, to.hi + i * columns + j, to.lo + i * columns + j);
  }

  // x [rows, W] as a right operand; whether all of it is finite
  static bool pair_rows(const float* x, long rows, const SplitMatrix& to) {
    Floats nothing{};  // zero, or NaN
    for (long i = 0; i < rows; i += 2) {
      const long place = i / kPair * kRightStep + i % kPair * kTileSide;
      for (long j = 0; j < W; j += L) {
        const Floats a = Simd<float>::load(x + i * W + j), b = Simd<float>::load(x + (i + 1) * W + j);
        const Words a_hi = upper(a), b_hi = upper(b);
        const Words a_lo = upper(a - (Floats)a_hi), b_lo = upper(b - (Floats)b_hi);
        nothing += (Floats)a_hi * 0.0f, nothing += (Floats)b_hi * 0.0f;
        const long at = place + j / kTileSide * kRightTile;
        Simd<uint32_t>::store(reinterpret_cast<uint32_t*>(to.hi + at), a_hi >> 16 | b_hi);
        Simd<uint32_t>::store(reinterpret_cast<uint32_t*>(to.lo + at), a_lo >> 16 | b_lo);
      }
    }
    return horizontal_sum<float>(nothing) == 0;
  }

  // Rows of x [., W] before the first one, which there is, with a number that is not finite.
  static long finite_rows(const float* x) {
    for (long i = 0;; ++i) {
      Floats nothing{};
      for (long j = 0; j < W; j += L) nothing += (Floats)upper(Simd<float>::load(x + i * W + j)) * 0.0f;
      if (horizontal_sum<float>(nothing) != 0) return i;
    }
  }

  // f(first row, first column) for the blocks of 32 x 32 of a result [rows, W]
  template <class F>
  static JET_INLINE void for_tiles(long rows, const F& f) {
    for (long i = 0; i < rows; i += kPair)
      for (long j = 0; j < W; j += kPair) f(i, j);
  }

  static JET_INLINE void load_sums(const float* x) {
    constexpr long row = W * sizeof(float);
    tile_load<0>(x, row), tile_load<1>(x + kTileSide, row);
    tile_load<2>(x + kTileSide * W, row), tile_load<3>(x + kTileSide * W + kTileSide, row);
  }

  static JET_INLINE void store_sums(float* x) {
    constexpr long row = W * sizeof(float);
    tile_store<0>(x, row), tile_store<1>(x + kTileSide, row);
    tile_store<2>(x + kTileSide * W, row), tile_store<3>(x + kTileSide * W + kTileSide, row);
  }

  static JET_INLINE void load_left(const uint16_t* a, long row) {
    tile_load<4>(a, row), tile_load<5>(a + kTileSide * row / long(sizeof(*a)), row);
  }

  static JET_INLINE void load_right(const uint16_t* b) {
    tile_load<6>(b, kTileBytes), tile_load<7>(b + kRightTile, kTileBytes);
  }

  static JET_INLINE void multiply_tiles() {
    tile_multiply_add<0, 4, 6>(), tile_multiply_add<1, 4, 7>();
    tile_multiply_add<2, 5, 6>(), tile_multiply_add<3, 5, 7>();
  }

  // Sums += rows i .. i + 32 of a [., columns] times columns j .. j + 32 of b, over the first 32 `steps` numbers.
  static JET_INLINE void multiply(const SplitMatrix& a, long i, long columns, const SplitMatrix& b, long j, long steps,
                                  RowsAhead& ahead) {
    const long row = columns * long(sizeof(*a.hi));
    for (long s = 0; s < steps; ++s) {
      const long left = i * columns + s * kPair, right = s * kRightStep + j / kTileSide * kRightTile;
      load_left(a.hi + left, row), load_right(b.lo + right), multiply_tiles();
      load_right(b.hi + right), multiply_tiles();
      load_left(a.lo + left, row), multiply_tiles();
      ahead.ask();
    }
  }

  long K_;
  SplitMatrix k_, q_, kt_, p_, state_, u_;
};

}  // namespace jet::cpu::JET_CPU_ISA

#endif
