// Blocks of keys in the tile registers of AMX, for up to 16 queries of bf16:
//
//   S^T += K q^T     K [16 keys, 32 columns]   q^T [32 columns, 16 queries]
//   O   += P V       P [16, 16 keys]           V [16 keys, 32 columns]      O [16, 16 columns]
//
// Both caches are read by the tile loads as they lie. A product sums pairs of neighbouring numbers of V, which are
// columns: P has the pair (p, 0) for the even columns and (0, p) for the odd ones. Up to 8 queries have these as two
// halves of one tile, more have a tile of each. P is rounded to bf16, and the sums of exponentials are those of the
// rounded ones, so that the weights add up to one.
//
// Tiles wait for what was stored just before. So the values of a block are added when the scores of the next one are
// there.
#pragma once

#include <algorithm>
#include <limits>

#include "csrc/attention/step_vectors_cpu.h"
#include "csrc/cpu/amx.h"
#include "csrc/cpu/elements.h"
#include "csrc/cpu/tasks.h"

#if defined(__AVX512F__)

namespace jet::cpu::JET_CPU_ISA {

class TileAttention {
  static constexpr long kTileWords = kTileNumbers / 2;
  static constexpr long kKeyTiles = kBlock / kTileSide;
  static_assert(kKeyTiles == 4);

 public:
  using Element = bf16;
  using Query = bf16;
  static constexpr bool kWholeBlocks = true;
  static constexpr long kMostQueries = kTileSide;

  // Memory of a worker.
  struct Room {
    uint32_t* q;         // [width / 32] tiles: [pair of columns, query]
    float* scores;       // [kBlock keys, 16 queries]
    uint32_t* weights;   // [kKeyTiles, parts] tiles of P: [query, pair (p, 0) or (0, p) of a key]
    float* o;            // [width / 32, parts] tiles of O
    float* sums;         // [group, 16] of exponentials, lane by lane
    float* most;         // [16] of the scores in base 2
    const bf16* values;  // of the block that is not yet added, or null
    long value_row;
  };

  TileAttention(long group, long width, float scale)
      : group_(group), width_(width), scale_(scale * kLog2e), parts_(group <= kTileSide / 2 ? 1 : 2) {}

  void carve(Carver& carver, Room& r) const {
    r.q = carver.take<uint32_t>(width_ / kTileColumns * kTileWords);
    r.scores = carver.take<float>(kBlock * kTileSide);
    r.weights = carver.take<uint32_t>(kKeyTiles * parts_ * kTileWords);
    r.o = carver.take<float>(width_ / kTileColumns * parts_ * kTileSums);
    r.sums = carver.take<float>(group_ * kTileSide);
    r.most = carver.take<float>(kTileSide);
  }

  WholeTiles registers() const { return {}; }

  // q [group, width]
  void begin(Room& room, const bf16* q, const AttentionSums<float>&) const {
    for (long c = 0; c < width_; c += kTileColumns) {
      Words pairs[kTileSide];
      for (long i = 0; i < kTileSide; ++i) pairs[i] = i < group_ ? load_words(q + i * width_ + c) : Words{};
      transpose_in_registers(pairs);
      uint32_t* to = room.q + c / kTileColumns * kTileWords;
      for (long i = 0; i < kTileSide; ++i) Simd<uint32_t>::store(to + i * kTileSide, pairs[i]);
    }
    std::fill_n(room.o, width_ / kTileColumns * parts_ * kTileSums, 0.0f);
    std::fill_n(room.weights, kKeyTiles * parts_ * kTileWords, 0u);
    std::fill_n(room.sums, group_ * kTileSide, 0.0f);
    std::fill_n(room.most, kTileSide, kNothing);
    room.values = nullptr;
  }

  // A block of kBlock keys, of which the first `count` are attended to; all are read, and values past them are finite.
  // The values are read later: until the next block is added, or the end.
  void add(Room& room, const bf16* keys, long key_row, const bf16* values, long value_row, long count,
           const AttentionSums<float>&) const {
    const Rows block{keys, values, key_row, value_row};
    Ahead ahead(block, width_);
    find_scores(room, block, ahead);
    add_values(room, [&] { ahead.next(); });
    parts_ == 1 ? soften<1>(room, count) : soften<2>(room, count);
    room.values = values, room.value_row = value_row;
  }

  // O in the order of load_two: of 32 columns first the even ones.
  void end(const Room& room, const AttentionSums<float>& to) const {
    add_values(room, [] {});
    for (long i = 0; i < group_; ++i)
      for (long c = 0; c < width_; c += kTileColumns)
        for (long odd = 0; odd < 2; ++odd)
          std::copy_n(sums_of_columns(room, i, c, odd), kTileSide, to.o + i * width_ + c + odd * kTileSide);
    for (long i = 0; i < group_; ++i) to.most[i] = room.most[i] * kLn2;
    for (long i = 0; i < group_; ++i) to.sum[i] = horizontal_sum<float>(load(room.sums + i * kTileSide));
  }

 private:
  static constexpr float kNothing = -std::numeric_limits<float>::infinity();
  static constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
  static constexpr long kAheadBytes = 16384;  // of keys and of values, between a prefetch and its use
  static constexpr int kLocality = 2;         // of prefetches: into L2

  // Of query i, the even or the odd ones of 32 columns.
  float* sums_of_columns(const Room& room, long i, long c, long odd) const {
    float* tiles = room.o + c / kTileColumns * parts_ * kTileSums;
    return tiles + (parts_ == 1 ? odd * kTileSide / 2 + i : odd * kTileSide + i) * kTileSide;
  }

  static JET_INLINE Words load_words(const bf16* p) { return (Words)_mm512_loadu_si512(p); }

  // The rows of a block in both caches.
  struct Rows {
    const bf16 *keys, *values;
    long key_row, value_row;
  };

  // Asks for the lines of a later block, 16 at each of the tile loads of this one: two in each quarter of its keys and
  // values. The CPU's prefetchers follow a stream in each page of 4 KB, and eight of them get more from memory than
  // two. More lines at once than the CPU can wait for (16) hold up the tile loads behind them.
  class Ahead {
   public:
    Ahead(const Rows& block, long width) : Ahead(block, width, kAheadBytes / (width * long(sizeof(bf16)))) {}

    JET_INLINE void next() {
      for (int line = 0; line < 2; ++line) {
#pragma GCC unroll 4
        for (long t = 0; t < kKeyTiles; ++t) {
          __builtin_prefetch(keys_ + t * kTileSide * key_row_ + column_, 0, kLocality);
          __builtin_prefetch(values_ + t * kTileSide * value_row_ + column_, 0, kLocality);
        }
        column_ += kTileColumns;
        if (column_ == width_) column_ = 0, keys_ += key_row_, values_ += value_row_;
      }
    }

   private:
    Ahead(const Rows& block, long width, long rows)
        : keys_(block.keys + rows * block.key_row),
          values_(block.values + rows * block.value_row),
          key_row_(block.key_row),
          value_row_(block.value_row),
          width_(width) {}

    const bf16 *keys_, *values_;
    long key_row_, value_row_, width_, column_ = 0;
  };

  void find_scores(const Room& room, const Rows& block, Ahead& ahead) const {
    const long row = block.key_row, bytes = row * long(sizeof(bf16));
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (long c = 0; c < width_; c += kTileColumns) {
      const bf16* from = block.keys + c;
      tile_load<7>(room.q + c / kTileColumns * kTileWords, kTileBytes);
      for_constants<kKeyTiles>([&](auto t) {
        constexpr int k = 4 + t % 3;
        tile_load<k>(from + t * kTileSide * row, bytes), tile_multiply_add<t, k, 7>();
        ahead.next();
      });
    }
    tile_store<0>(room.scores, kTileBytes), tile_store<1>(room.scores + kTileSums, kTileBytes);
    tile_store<2>(room.scores + 2 * kTileSums, kTileBytes), tile_store<3>(room.scores + 3 * kTileSums, kTileBytes);
  }

  // Vector v of the scores has those of key v for all queries. Up to 8 queries leave room for another key, in the upper
  // half: with one part vector 16 t + j is of the keys 32 t + j and 32 t + 16 + j.
  template <int parts>
  static JET_INLINE Floats scores_of(const Room& room, long v) {
    if constexpr (parts == 2) return load(room.scores + v * kTileSide);
    const float* lower = room.scores + (v + v / kTileSide * kTileSide) * kTileSide;
    const __m256 upper = _mm256_loadu_ps(lower + kTileSums);
    return (Floats)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(lower)), upper, 1);
  }

  // Its lanes whose keys are below `count`.
  template <int parts>
  static JET_INLINE __mmask16 lanes_below(long v, long count) {
    if constexpr (parts == 2) return v < count ? 0xffff : 0;
    const long lower = v + v / kTileSide * kTileSide;
    return (lower < count ? 0x00ff : 0) | (lower + kTileSide < count ? 0xff00 : 0);
  }

  // 2^x, with a relative error below 3e-6: bf16 rounds off up to 2e-3.
  static JET_INLINE Floats power_of_two(Floats x) {
    const Floats f = (Floats)_mm512_maskz_reduce_ps(0xffff, (__m512)x, _MM_FROUND_TO_NEG_INF);  // x - floor(x)
    Floats e = f * 0.0135341679f + 0.0520114606f;
    e = e * f + 0.24144275f;
    e = e * f + 0.69300383f;
    e = e * f + 1.0000026f;
    return (Floats)_mm512_maskz_scalef_ps(0xffff, (__m512)e, (__m512)x);  // by 2^floor(x)
  }

  // Scores become exponentials of what they are above the largest so far; what came before shrinks by as much. Before a
  // score above -inf there is nothing to compare with, and 0 stands in.
  template <int parts>
  void soften(const Room& room, long count) const {
    constexpr long kVectors = kBlock / 2 * parts, kQueries = kTileSide / 2 * parts;
    alignas(64) float scores[kVectors][kTileSide];
    const Floats before = load(room.most);
    Floats some[4] = {before, before, before, before};
    for (long v = 0; v < kVectors; v += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        Floats x = scores_of<parts>(room, v + i) * scale_;
        if (count < kBlock)
          x = (Floats)_mm512_mask_mov_ps((__m512)(Floats{} + kNothing), lanes_below<parts>(v + i, count), (__m512)x);
        some[i] = x > some[i] ? x : some[i];
        store(scores[v + i], x);
      }
    for (int n = 2; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) some[i] = some[i + n] > some[i] ? some[i + n] : some[i];
    Floats best = some[0];
    if constexpr (parts == 1) {  // both halves of the lanes have the larger one
      const Floats other = (Floats)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)best, (__m512)best, 0x4e);
      best = other > best ? other : best;
    }
    const Floats reference = best == kNothing ? Floats{} : best;
    store(room.most, best);
    shrink(room, exponential((before - reference) * kLn2));
    for (long t = 0; t < kVectors / kTileSide; ++t) {
      Floats x[kTileSide];
#pragma GCC unroll 16
      for (int j = 0; j < kTileSide; ++j) x[j] = load(scores[t * kTileSide + j]) - reference;
      transpose_in_registers(x);
#pragma GCC unroll 16
      for (int i = 0; i < kTileSide; ++i) store(scores[t * kTileSide + i], x[i]);
    }
    for (long t = 0; t < kKeyTiles; ++t) {
      uint32_t* even = room.weights + t * parts * kTileWords;
      uint32_t* odd = even + kQueries * kTileSide;
      for (long i = 0; i < group_; ++i) {
        NativeBf16 rounded[kTileSide];
        store(rounded, power_of_two(load(scores[t * kQueries + i])));
        const Words upper = (Words)load(rounded);
        store(room.sums + i * kTileSide, load(room.sums + i * kTileSide) + (Floats)upper);
        Simd<uint32_t>::store(even + i * kTileSide, upper >> 16);
        Simd<uint32_t>::store(odd + i * kTileSide, upper);
      }
    }
  }

  void shrink(const Room& room, Floats by) const {
    alignas(64) float factors[kTileSide];
    store(factors, by);
    for (long i = 0; i < group_; ++i) {
      if (factors[i] == 1) continue;
      float* sums = room.sums + i * kTileSide;
      store(sums, load(sums) * factors[i]);
      for (long c = 0; c < width_; c += kTileColumns)
        for (long odd = 0; odd < 2; ++odd) {
          float* o = sums_of_columns(room, i, c, odd);
          store(o, load(o) * factors[i]);
        }
    }
  }

  // Of the block before; beside() is called as often as there are tiles of values.
  template <class F>
  void add_values(const Room& room, const F& beside) const {
    if (room.values == nullptr)
      for (long t = 0; t < kKeyTiles * (width_ / kTileColumns); ++t) beside();
    else if (parts_ == 1)
      add_values<1>(room, beside);
    else
      add_values<2>(room, beside);
  }

  // Four tiles of O at a time.
  template <int parts, class F>
  void add_values(const Room& room, const F& beside) const {
    constexpr int kGroups = 4 / parts;  // of 32 columns
    const long bytes = room.value_row * long(sizeof(bf16));
    for (long c = 0; c < width_; c += kGroups * kTileColumns) {
      const long groups = smaller(kGroups, (width_ - c) / kTileColumns);
      float* o = room.o + c / kTileColumns * parts * kTileSums;
      for_constants<4>([&](auto i) {
        if (i / parts < groups) tile_load<i>(o + i * kTileSums, kTileBytes);
      });
      for (long t = 0; t < kKeyTiles; ++t) {
        const bf16* values = room.values + t * kTileSide * room.value_row + c;
        const uint32_t* weights = room.weights + t * parts * kTileWords;
        tile_load<6>(weights, kTileBytes);
        if constexpr (parts == 2) tile_load<7>(weights + kTileWords, kTileBytes);
        for_constants<kGroups>([&](auto i) {
          if (i >= groups) return;
          tile_load<4 + i % 2>(values + i * kTileColumns, bytes);
          tile_multiply_add<i * parts, 6, 4 + i % 2>();
          if constexpr (parts == 2) tile_multiply_add<i * parts + 1, 7, 4 + i % 2>();
          beside();
        });
      }
      for_constants<4>([&](auto i) {
        if (i / parts < groups) tile_store<i>(o + i * kTileSums, kTileBytes);
      });
    }
  }

  long group_, width_;
  float scale_;  // to logarithms of base 2
  long parts_;   // tiles of P for 16 keys
};

}  // namespace jet::cpu::JET_CPU_ISA

#endif
