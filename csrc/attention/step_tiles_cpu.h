// Blocks of keys in the tile registers of AMX, for up to 16 queries of bf16:
//
//   S^T += K q^T     K [16 keys, 32 columns] as it lies in its cache   q^T [32 columns, 16 queries]
//   O   += P V       P [queries, 32 keys]    V [32 keys, 16 columns]   O [queries, 16 columns]
//
// P is rounded to bf16. Up to 8 queries leave half of its rows free: these take what the rounding left, and their sums
// are added in the end. More queries have no such rows; their sums of exponentials are those of the rounded ones, so
// that the weights add up to one. V takes pairs of keys side by side: of two rows the even columns make one tile and
// the odd ones the next.
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

 public:
  using Element = bf16;
  using Query = bf16;
  static constexpr bool kWholeBlocks = true;
  static constexpr long kMostQueries = kTileSide;

  // Memory of a worker.
  struct Room {
    uint32_t* q;      // [width / 32] tiles: [pair of columns, query]
    float* scores;    // [kBlock keys, 16 queries]
    float* by_query;  // [16, kBlock]
    bf16* weights;    // [kBlock / 32] tiles: [query, 32 keys]; zeros in rows of no query
    float* o;         // [16, width] the sums of values
    uint32_t* pairs;  // [2, 4] tiles: [pair of keys, column]
    float* sums;      // [group, 16] of exponentials, lane by lane
    float* most;      // [16]
  };

  TileAttention(long group, long width, float scale)
      : group_(group), width_(width), scale_(scale), rest_(group <= kTileSide / 2 ? kTileSide / 2 : 0) {}

  void carve(Carver& carver, Room& r) const {
    r.q = carver.take<uint32_t>(width_ / kTileColumns * kTileWords);
    r.scores = carver.take<float>(kBlock * kTileSide);
    r.by_query = carver.take<float>(kTileSide * kBlock);
    r.weights = carver.take<bf16>(kBlock * kTileSide);
    r.o = carver.take<float>(kTileSide * width_);
    r.pairs = carver.take<uint32_t>(2 * 4 * kTileWords);
    r.sums = carver.take<float>(group_ * kTileSide);
    r.most = carver.take<float>(kTileSide);
  }

  WholeTiles registers() const { return {}; }

  // q [group, width]
  void begin(const Room& room, const bf16* q, const AttentionSums<float>&) const {
    for (long c = 0; c < width_; c += kTileColumns) {
      Words pairs[kTileSide];
      for (long i = 0; i < kTileSide; ++i) pairs[i] = i < group_ ? load_words(q + i * width_ + c) : Words{};
      transpose_in_registers(pairs);
      uint32_t* to = room.q + c / kTileColumns * kTileWords;
      for (long i = 0; i < kTileSide; ++i) Simd<uint32_t>::store(to + i * kTileSide, pairs[i]);
    }
    std::fill_n(room.o, kTileSide * width_, 0.0f);
    std::fill_n(room.weights, kBlock * kTileSide, bf16{});
    std::fill_n(room.sums, group_ * kTileSide, 0.0f);
    std::fill_n(room.most, kTileSide, kNothing);
  }

  // A block of kBlock keys, of which the first `count` are attended to; all are read, and values past them are finite.
  void add(const Room& room, const bf16* keys, long key_row, const bf16* values, long value_row, long count,
           const AttentionSums<float>&) const {
    find_scores(room, keys, key_row);
    soften(room, count);
    add_values(room, keys, key_row, values, value_row);
  }

  void end(const Room& room, const AttentionSums<float>& to) const {
    std::copy_n(room.o, group_ * width_, to.o);
    if (rest_ > 0)
      for (long i = 0; i < group_ * width_; ++i) to.o[i] += room.o[rest_ * width_ + i];
    std::copy_n(room.most, group_, to.most);
    for (long i = 0; i < group_; ++i) to.sum[i] = horizontal_sum<float>(load(room.sums + i * kTileSide));
  }

 private:
  static constexpr float kNothing = -std::numeric_limits<float>::infinity();
  static_assert(kBlock == 4 * kTileSide);
  static constexpr long kKeyTiles = kBlock / kTileSide, kValueTiles = kBlock / kTileColumns;

  static JET_INLINE Words load_words(const bf16* p) { return (Words)_mm512_loadu_si512(p); }

  void find_scores(const Room& room, const bf16* keys, long key_row) const {
    const long bytes = key_row * long(sizeof(bf16));
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (long c = 0; c < width_; c += kTileColumns) {
      const bf16* from = keys + c;
      tile_load<7>(room.q + c / kTileColumns * kTileWords, kTileBytes);
      tile_load<4>(from, bytes), tile_multiply_add<0, 4, 7>();
      tile_load<5>(from += kTileSide * key_row, bytes), tile_multiply_add<1, 5, 7>();
      tile_load<6>(from += kTileSide * key_row, bytes), tile_multiply_add<2, 6, 7>();
      tile_load<4>(from += kTileSide * key_row, bytes), tile_multiply_add<3, 4, 7>();
    }
    tile_store<0>(room.scores, kTileBytes), tile_store<1>(room.scores + kTileSums, kTileBytes);
    tile_store<2>(room.scores + 2 * kTileSums, kTileBytes), tile_store<3>(room.scores + 3 * kTileSums, kTileBytes);
  }

  // Scores become exponentials of what they are above the largest so far; what came before shrinks by as much. Before a
  // score above -inf there is nothing to compare with, and 0 stands in.
  void soften(const Room& room, long count) const {
    const Floats before = load(room.most);
    Floats some[4] = {before, before, before, before};
    for (long j = 0; j < kBlock; j += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        float* score = room.scores + (j + i) * kTileSide;
        const Floats x = j + i < count ? load(score) * scale_ : Simd<float>::all(kNothing);
        some[i] = x > some[i] ? x : some[i];
        store(score, x);
      }
    for (int n = 2; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) some[i] = some[i + n] > some[i] ? some[i + n] : some[i];
    const Floats best = some[0];
    const Floats reference = best == kNothing ? Floats{} : best;
    store(room.most, best);
    shrink(room, exponential(before - reference));
    for (long t = 0; t < kKeyTiles; ++t) {
      Floats x[kTileSide];
#pragma GCC unroll 16
      for (int j = 0; j < kTileSide; ++j) x[j] = load(room.scores + (t * kTileSide + j) * kTileSide) - reference;
      transpose_in_registers(x);
#pragma GCC unroll 16
      for (int i = 0; i < kTileSide; ++i) store(room.by_query + i * kBlock + t * kTileSide, x[i]);
    }
    for (long i = 0; i < group_; ++i) {
      Floats sum = load(room.sums + i * kTileSide);
#pragma GCC unroll 4
      for (long t = 0; t < kKeyTiles; ++t) {
        NativeBf16* e =
            reinterpret_cast<NativeBf16*>(room.weights) + (t / 2 * kTileSide + i) * kTileColumns + t % 2 * kTileSide;
        const Floats x = exponential(load(room.by_query + i * kBlock + t * kTileSide));
        store(e, x);
        const Floats rounded = load(e);
        if (rest_ > 0) store(e + rest_ * kTileColumns, x - rounded);
        sum += rest_ > 0 ? x : rounded;
      }
      store(room.sums + i * kTileSide, sum);
    }
  }

  void shrink(const Room& room, Floats by) const {
    alignas(64) float factors[kTileSide];
    store(factors, by);
    for (long i = 0; i < group_; ++i) {
      if (factors[i] == 1) continue;
      float* sums = room.sums + i * kTileSide;
      store(sums, load(sums) * factors[i]);
      for (float* o = room.o + i * width_; o < room.o + kTileSide * width_; o += rest_ * width_) {
        for (long c = 0; c < width_; c += kTileSide) store(o + c, load(o + c) * factors[i]);
        if (rest_ == 0) break;
      }
    }
  }

  void add_values(const Room& room, const bf16* keys, long key_row, const bf16* values, long value_row) const {
    long c = 0;
    for (; c + 64 <= width_; c += 64) add_values<2>(room, keys + c, key_row, values + c, value_row, room.o + c);
    if (c < width_) add_values<1>(room, keys + c, key_row, values + c, value_row, room.o + c);
  }

  // Of 32 n columns
  template <int n>
  void add_values(const Room& room, const bf16* keys, long key_row, const bf16* values, long value_row,
                  float* o) const {
    const long o_row = width_ * long(sizeof(float));
    tile_load<0>(o, o_row), tile_load<1>(o + kTileSide, o_row);
    if (n == 2) tile_load<2>(o + 2 * kTileSide, o_row), tile_load<3>(o + 3 * kTileSide, o_row);
    for (long t = 0; t < kValueTiles; ++t) {
      const long j = t * kTileColumns;
      uint32_t* pairs = room.pairs + t % 2 * 4 * kTileWords;
      pair_values<n>(keys + j * key_row, key_row, values + j * value_row, value_row, pairs);
      tile_load<7>(room.weights + t * kTileNumbers, kTileBytes);
      tile_load<4>(pairs, kTileBytes), tile_multiply_add<0, 7, 4>();
      tile_load<5>(pairs + kTileWords, kTileBytes), tile_multiply_add<1, 7, 5>();
      if (n == 1) continue;
      tile_load<6>(pairs + 2 * kTileWords, kTileBytes), tile_multiply_add<2, 7, 6>();
      tile_load<4>(pairs + 3 * kTileWords, kTileBytes), tile_multiply_add<3, 7, 4>();
    }
    tile_store<0>(o, o_row), tile_store<1>(o + kTileSide, o_row);
    if (n == 2) tile_store<2>(o + 2 * kTileSide, o_row), tile_store<3>(o + 3 * kTileSide, o_row);
  }

  // 32 rows of 32 n columns. Asks for later keys and values on the way.
  template <int n>
  JET_INLINE void pair_values(const bf16* keys, long key_row, const bf16* values, long value_row, uint32_t* to) const {
    const long ahead = kPrefetchBytes / (width_ * long(sizeof(bf16)));
    const bf16 *key = keys + ahead * key_row, *value = values + ahead * value_row;
    for (long j = 0; j < kTileColumns; j += 2, to += kTileSide) {
#pragma GCC unroll 2
      for (int i = 0; i < n; ++i) {
        const long c = i * kTileColumns;
        __builtin_prefetch(key + c, 0, kLocality), __builtin_prefetch(key + key_row + c, 0, kLocality);
        __builtin_prefetch(value + c, 0, kLocality), __builtin_prefetch(value + value_row + c, 0, kLocality);
        const Words x = load_words(values + c), y = load_words(values + value_row + c);
        Simd<uint32_t>::store(to + 2 * i * kTileWords, (x & 0xffff) | (y << 16));
        Simd<uint32_t>::store(to + (2 * i + 1) * kTileWords, (x >> 16) | (y & 0xffff0000u));
      }
      key += 2 * key_row, value += 2 * value_row, values += 2 * value_row;
    }
  }

  static constexpr int kLocality = 2;  // into L2: a block and its tiles take most of L1

  long group_, width_;
  float scale_;
  long rest_;  // the row of P with what rounding left of row i is i + rest_; 0: there is none
};

}  // namespace jet::cpu::JET_CPU_ISA

#endif
