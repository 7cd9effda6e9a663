// The product in the tile registers of AMX: up to 32 rows of W times up to 32 rows of x.
//
//   acc[i][j] += W_i X_j^T     W_i [16, 32]   X_j^T [32, 16]   acc[i][j] [16 rows of W, 16 rows of x]
//
// x is packed once, in pairs of columns. W in bf16 is read by the tile loads as it lies in memory, 16 m rows side by
// side; integers, and the last rows and columns of W, are first written as tiles of bf16 to a buffer that stays in L1.
#pragma once

#include <utility>

#include "csrc/cpu/amx.h"
#include "csrc/linear/columns_cpu.h"
#include "csrc/linear/formats_cpu.h"

#if defined(__AVX512F__)

namespace jet::cpu::JET_CPU_ISA {

template <class Format, bool scaled>
class TileLinear {
  using Weight = typename Format::Weight;
  static_assert(kBlock == kTileSide && Format::width == kTileColumns);
  static constexpr long kTilePairs = kTileNumbers / 2;
  static constexpr long kChunk = 8;            // steps in a buffer: 16 KiB for 32 rows
  static constexpr long kMostAhead = 1 << 18;  // bytes of W that wait in the L2
  static constexpr long kChunkBytes =
      1 << 17;                            // of W that stay in the L2, beside their columns of x and what comes next
  static constexpr long kTotalTiles = 8;  // tiles of x whose sums are kept: 16 KiB with 32 rows of W

 public:
  explicit TileLinear(const LinearParams& p)
      : p_(p), columns_(p, Format::width), x_tiles_((p.N + kTileSide - 1) / kTileSide) {}

  void run(const Parallel& parallel) const {
    const Buffer<uint32_t> x(x_tiles_ * columns_.steps() * kTilePairs);
    run_even_tasks(for_work(parallel, kCopy * double(p_.N) * p_.C), larger(1, parallel.threads),
                   x_tiles_ * columns_.groups,
                   [&](long, long task) { pack_x(task / columns_.groups, task % columns_.groups, x.get()); });
    // Of few rows of x a panel has 16 rows of W, as many as there are prefetchers to follow them; of more, 32, which
    // halves the loads of x.
    const long side = x_tiles_ == 1 ? kTileSide : 2 * kTileSide, panels = (p_.P + side - 1) / side;
    const Parallel workers = for_work(parallel, double(p_.N) * p_.C * p_.P);
    const long count = larger(1, workers.threads);
    workers(0, count, 1, [&](int64_t begin, int64_t end) {
      const WholeTiles tiles;
      for (long panel = panels * begin / count; panel < panels * end / count; ++panel) {
        const long p0 = panel * side;
        if (side == kTileSide || p_.P - p0 <= kTileSide)
          run_panel<1>(p0, x.get());
        else
          run_panel<2>(p0, x.get());
      }
    });
  }

 private:
  // Tiles of x are multiplied in twos, which stand side by side at each step.
  long place(long tile, long step) const {
    const long first = tile / 2 * 2, beside = smaller(2, x_tiles_ - first);
    return (first * columns_.steps() + step * beside + tile - first) * kTilePairs;
  }

  // Group g of the 16 rows of x in a tile: at each step [pair][row].
  void pack_x(long tile, long g, uint32_t* x) const {
    columns_.for_steps(g, [&](long c, long n, long step) {
      Words pairs[kTileSide];
      for (long i = 0; i < kTileSide; ++i) {
        const long row = tile * kTileSide + i;
        const bf16* from = static_cast<const bf16*>(p_.x) + row * p_.x_row + c * p_.x_column;
        pairs[i] = row < p_.N ? Format::load_pairs(from, p_.x_column, n) : Words{};
      }
      transpose_in_registers(pairs);
      uint32_t* to = x + place(tile, step);
      for (long i = 0; i < kTileSide; ++i) Simd<uint32_t>::store(to + i * kTileSide, pairs[i]);
    });
  }

  // Tiles of W in memory: row r of tile i at step s is at data + i * tile + s * step + r * row.
  struct Tiles {
    const char* data;
    long tile, step, row;
  };

  // Rows whose lines are asked for ahead of their use, one line of each at every step.
  struct Ahead {
    const char* data = nullptr;
    long row = 0, rows = 0;
  };

  // acc[i][j] += W_i X_j^T over `steps` steps, x from the first of them on
  template <int m, int n>
  static JET_INLINE void multiply(const Tiles& w, const uint32_t* x, long steps, Ahead ahead = {}) {
    const char* data = w.data;
    for (long s = 0; s < steps; ++s, data += w.step, x += n * kTilePairs) {
      for (long i = 0; i < ahead.rows; ++i) __builtin_prefetch(ahead.data + s * kTileBytes + i * ahead.row, 0, 2);
      for_constants<m>([&](auto i) { tile_load<4 + i>(data + i * w.tile, w.row); });
      for_constants<n>([&](auto j) { tile_load<6 + j>(x + j * kTilePairs, kTileBytes); });
      for_constants<m>(
          [&](auto i) { for_constants<n>([&](auto j) { tile_multiply_add<2 * i + j, 4 + i, 6 + j>(); }); });
    }
  }

  template <int m, int n>
  static JET_INLINE void zero() {
    for_constants<m>([&](auto i) { for_constants<n>([&](auto j) { tile_zero<2 * i + j>(); }); });
  }

  template <int m>
  using Sums = float[m][kTotalTiles][kTileSums];

  template <int m, int n>
  static JET_INLINE void load(const Sums<m>& sums, long t) {
    for_constants<m>(
        [&](auto i) { for_constants<n>([&](auto j) { tile_load<2 * i + j>(sums[i][t + j], kTileBytes); }); });
  }

  template <int m, int n>
  static JET_INLINE void store(Sums<m>& sums, long t) {
    for_constants<m>(
        [&](auto i) { for_constants<n>([&](auto j) { tile_store<2 * i + j>(sums[i][t + j], kTileBytes); }); });
  }

  // Columns c .. c + columns (c is even) of 16 m rows of W as tiles, zeros after the last column. Rows after the last
  // are taken to be the last, and nobody reads their sums.
  template <int m>
  Tiles pack_weight(long p0, long c, long columns, uint32_t* buffer) const {
    const long whole = columns / kTileColumns;
    for (long i = 0; i < m * kTileSide; ++i) {
      const Weight* row = static_cast<const Weight*>(p_.weight) + smaller(p0 + i, p_.P - 1) * p_.weight_row;
      const Weight* w = Format::row_at(row, c);
      uint32_t* to = buffer + i / kTileSide * kChunk * kTilePairs + i % kTileSide * kTileSide;
      Words pairs[1];
      const Weight* end = Format::row_at(w, columns);
      for (const Weight* next = w; scaled && next < end; next += 64)
        __builtin_prefetch(next + m * kTileSide * p_.weight_row);  // the next panel: rows are short to the prefetchers
#pragma GCC unroll 4
      for (long s = 0; s < whole; ++s) {
        Format::load(Format::row_at(w, s * kTileColumns), kTileColumns, pairs);
        Simd<uint32_t>::store(to + s * kTilePairs, pairs[0]);
      }
      if (whole * kTileColumns == columns) continue;
      Format::load(Format::row_at(w, whole * kTileColumns), columns - whole * kTileColumns, pairs);
      Simd<uint32_t>::store(to + whole * kTilePairs, pairs[0]);
    }
    return {reinterpret_cast<const char*>(buffer), kChunk * kTilePairs * 4, kTilePairs * 4, kTileBytes};
  }

  // 16 m rows of W, all rows of x
  template <int m>
  void run_panel(long p0, const uint32_t* x) const {
    for (long t = 0; t < x_tiles_; t += kTotalTiles) {
      const long tiles = smaller(kTotalTiles, x_tiles_ - t);
      if constexpr (scaled)
        run_scaled<m>(p0, t, tiles, x);
      else
        run_dense<m>(p0, t, tiles, x);
    }
  }

  // `tiles` tiles of x from t on, two in a pass. W goes through in chunks of columns, which the later passes over them
  // find in the L2; meanwhile the lines of the next chunk are asked for, so that memory does not wait for these passes.
  // Longer rows, and 16 of them side by side, the CPU's prefetchers find alone.
  template <int m>
  void run_dense(long p0, long t, long tiles, const uint32_t* x) const {
    alignas(64) Sums<m> sums;
    if (p_.C == 0) __builtin_memset(sums, 0, sizeof(sums));
    const long row = p_.weight_row * long(sizeof(bf16)), rows = m * kTileSide;
    const char* const weight = static_cast<const char*>(p_.weight) + p0 * row;
    const long passes = (tiles + 1) / 2, whole = columns_.whole_steps, most = kChunkBytes / (rows * kTileBytes);
    const long chunks = passes == 1 ? 1 : larger(1, (whole + most - 1) / most);
    const auto add = [&](const Tiles& w, long first, long steps, const Ahead& ahead) {
      for (long j = 0; j < tiles; j += 2) {
        const uint32_t* from = x + place(t + j, first);
        const long begin = ahead.rows * (j / 2) / passes, end = ahead.rows * (j / 2 + 1) / passes;
        const Ahead share = {ahead.data + begin * ahead.row, ahead.row, end - begin};
        const auto add_pass = [&](auto n) {
          first == 0 ? zero<m, n>() : load<m, n>(sums, j);
          multiply<m, n>(w, from, steps, share);
          store<m, n>(sums, j);
        };
        if (j + 2 <= tiles)
          add_pass(std::integral_constant<int, 2>());
        else
          add_pass(std::integral_constant<int, 1>());
      }
    };
    long done = 0;  // steps
    if (p0 + rows <= p_.P)
      for (long chunk = 0; chunk < chunks; ++chunk) {
        const long end = whole * (chunk + 1) / chunks;
        Ahead ahead;
        if (chunk + 1 < chunks)
          ahead = {weight + end * kTileBytes, row, rows};
        else if (tiles > 1 && p0 + 2 * rows <= p_.P && t + tiles == x_tiles_ && rows * row <= kMostAhead)
          ahead = {weight + rows * row, row, rows};
        add({weight + done * kTileBytes, kTileSide * row, kTileBytes, row}, done, end - done, ahead);
        done = end;
      }
    alignas(64) uint32_t buffer[m * kChunk * kTilePairs];
    for (long steps; done < columns_.steps(); done += steps) {
      steps = smaller(kChunk, columns_.steps() - done);
      const long c = done * kTileColumns;
      add(pack_weight<m>(p0, c, smaller(steps * kTileColumns, p_.C - c), buffer), done, steps, {});
    }
    for (int i = 0; i < m; ++i)
      for (long j = 0; j < tiles; ++j) store_tile(p0 + i * kTileSide, (t + j) * kTileSide, sums[i][j]);
  }

  // `tiles` tiles of x from t on. The chunk after the one that is multiplied is widened meanwhile.
  template <int m>
  void run_scaled(long p0, long t, long tiles, const uint32_t* x) const {
    alignas(64) uint32_t buffers[2][m * kChunk * kTilePairs];
    alignas(64) float total[m * kTotalTiles][kTileSums];
    alignas(64) Sums<m> sums;
    for (long i = 0; i < m; ++i) __builtin_memset(total[i * kTotalTiles], 0, tiles * sizeof(total[0]));
    const long group_chunks = (columns_.group_steps + kChunk - 1) / kChunk, chunks = columns_.groups * group_chunks;
    const auto pack = [&](long chunk) {
      const long g = chunk / group_chunks, first = chunk % group_chunks * kChunk * kTileColumns;
      const long columns = smaller(kChunk * kTileColumns, columns_.group - first);
      return pack_weight<m>(p0, g * columns_.group + first, columns, buffers[chunk % 2]);
    };
    Tiles w{};
    if (chunks > 0) w = pack(0);
    for (long chunk = 0; chunk < chunks; ++chunk) {
      const Tiles next = chunk + 1 < chunks ? pack(chunk + 1) : w;
      const long g = chunk / group_chunks, first = chunk % group_chunks * kChunk;
      const long step = g * columns_.group_steps + first, steps = smaller(kChunk, columns_.group_steps - first);
      for (long j = 0; j < tiles; j += 2) {
        const uint32_t* from = x + place(t + j, step);
        if (j + 2 <= tiles)
          zero<m, 2>(), multiply<m, 2>(w, from, steps), store<m, 2>(sums, 0);
        else
          zero<m, 1>(), multiply<m, 1>(w, from, steps), store<m, 1>(sums, 0);
        for (long i = 0; i < m; ++i)
          for (long k = j; k < smaller(j + 2, tiles); ++k)
            add_scaled(p0 + i * kTileSide, g, sums[i][k - j], total[i * kTotalTiles + k]);
      }
      w = next;
    }
    for (long i = 0; i < m; ++i)
      for (long j = 0; j < tiles; ++j) store_tile(p0 + i * kTileSide, (t + j) * kTileSide, total[i * kTotalTiles + j]);
  }

  void add_scaled(long p0, long g, const float* sums, float* total) const {
    for (long i = 0; i < smaller(kTileSide, p_.P - p0); ++i) {
      const Floats scale = Simd<float>::all(p_.scale[(p0 + i) * p_.G + g]);
      float* to = total + i * kTileSide;
      Simd<float>::store(to, Simd<float>::load(to) + scale * Simd<float>::load(sums + i * kTileSide));
    }
  }

  // y of sums [rows of W, rows of x from n on]
  void store_tile(long p0, long n, const float* sums) const {
    Floats rows[kTileSide];
    for (long i = 0; i < kTileSide; ++i) rows[i] = Simd<float>::load(sums + i * kTileSide);
    transpose_in_registers(rows);
    alignas(64) float by_row[kTileSums];
    for (long i = 0; i < kTileSide; ++i) Simd<float>::store(by_row + i * kTileSide, rows[i]);
    for (long i = 0; i < smaller(kTileSide, p_.N - n); ++i) store_outputs<bf16>(p_, n + i, p0, by_row + i * kTileSide);
  }

  const LinearParams& p_;
  const Columns columns_;
  const long x_tiles_;
};

}  // namespace jet::cpu::JET_CPU_ISA

#endif
