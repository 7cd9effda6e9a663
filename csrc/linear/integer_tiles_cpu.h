// Weights of 8 and 4 bits times x as integers of 30 bits (csrc/linear/integers_cpu.h) in the tile registers of AMX: x
// is four digits of 8 bits, so that a tile of x has four rows.
//
//   q = digit_0 + 2^8 digit_1 + 2^16 digit_2 + 2^24 digit_3     -128 <= digit < 128
//   acc += W X     W [16, 64]   X [64, 4 rows x 4 digits]   acc [16 rows of W, 4 rows x 4 digits] int32
//
// int8 is read by the tile loads as it lies in memory; int4, and the last rows and columns of W, are first written as
// tiles to a buffer that stays in L1.
#pragma once

#include "csrc/linear/integers_cpu.h"
#include "csrc/linear/tiles_cpu.h"

#if defined(__AVX512F__)

namespace jet::cpu::JET_CPU_ISA {

constexpr long kMostIntegerRows = 8;  // of bf16: for more, tiles of bf16, which take half the products, are faster

// Byte i of row r of tile v holds column `vectors` i + v of a step.
struct Int8Bytes {
  using Weight = int8_t;
  static constexpr int vectors = 1;
  static constexpr bool direct = true;  // a tile is rows of W in memory
  static JET_INLINE void split(__m512i bytes, __m512i (&units)[1]) { units[0] = bytes; }
};

struct Int4Bytes {
  using Weight = uint8_t;
  static constexpr int vectors = 2;
  static constexpr bool direct = false;
  static JET_INLINE void split(__m512i bytes, __m512i (&units)[2]) {
    const __m512i low = _mm512_set1_epi8(15), eight = _mm512_set1_epi8(8);
    units[0] = _mm512_sub_epi8(_mm512_and_si512(bytes, low), eight);
    units[1] = _mm512_sub_epi8(_mm512_and_si512((__m512i)((Words)bytes >> 4), low), eight);
  }
};

template <class Format, class Numbers, class T>
class IntegerTileLinear {
  using Weight = typename Format::Weight;
  using RowScale = typename IntegerRow<T>::Scale;
  static_assert(kBlock == kTileSide);
  static constexpr int V = Format::vectors;
  static constexpr long kRowsOfX = 4;                    // in a tile
  static constexpr long kTile = kTileSide * kTileBytes;  // bytes
  static constexpr long kPart = 4 / V;  // steps of which sums are kept apart: they are exact in fp32 too
  static constexpr int kParts = 4;      // that are multiplied before their sums are read, which takes long to wait for
  static constexpr long kTotals = 8;    // tiles of x whose sums are kept: 8 KiB
  static constexpr long kAhead = 1024;  // bytes of a row of W that are asked for before they are read

 public:
  explicit IntegerTileLinear(const LinearParams& p)
      : p_(p), columns_(p, V * kTileBytes), x_tiles_((p.N + kRowsOfX - 1) / kRowsOfX) {}

  void run(const Parallel& parallel) const {
    const Buffer<int8_t> x(x_tiles_ * x_tile());
    const Buffer<RowScale> scales(p_.N);
    run_even_tasks(for_work(parallel, kCopy * double(p_.N) * p_.C), larger(1, parallel.threads), x_tiles_,
                   [&](long, long t) { pack_x(t, x.get() + t * x_tile(), scales.get()); });
    const Parallel workers = for_work(parallel, double(p_.N) * p_.C * p_.P);
    const long count = larger(1, workers.threads), blocks = (p_.P + kBlock - 1) / kBlock;
    workers(0, count, 1, [&](int64_t begin, int64_t end) {
      const WholeTiles tiles;
      for (long block = blocks * begin / count; block < blocks * end / count; ++block)
        for (long t = 0; t < x_tiles_; t += kTotals)
          run_block(block * kBlock, t, smaller(kTotals, x_tiles_ - t), x.get(), scales.get());
    });
    run_rows_of_numbers<Numbers, T>(p_, scales.get(), parallel);
  }

 private:
  long x_tile() const { return columns_.steps() * V * kTile; }  // bytes of x [steps, V, 16, 4 rows, 4 digits, 4]

  void pack_x(long t, int8_t* to, RowScale* scales) const {
    if ((t + 1) * kRowsOfX > p_.N) __builtin_memset(to, 0, x_tile());
    for (long n = t * kRowsOfX; n < smaller((t + 1) * kRowsOfX, p_.N); ++n) {
      const IntegerRow<T> x(p_, n, 28);
      scales[n] = x.scale();
      for (long g = 0; g < columns_.groups; ++g)
        columns_.for_steps(g, [&](long c, long count, long step) {
          int8_t* tiles = to + step * V * kTile + n % kRowsOfX * 16;
          for (long i = 0; i < kTileBytes / 16; ++i) {  // 16 columns of each of the V tiles
            Ints q[V];
            for (long v = 0; v < V; ++v) q[v] = x.at(c + (i * V + v) * 16, count - (i * V + v) * 16);
            if constexpr (V == 2) {
              constexpr Ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
              const Ints low = q[0];
              q[0] = __builtin_shuffle(low, q[1], even);
              q[1] = __builtin_shuffle(low, q[1], even + 1);
            }
            for (long v = 0; v < V; ++v) store_digits(q[v], tiles + v * kTile + i * 4 * kTileBytes);
          }
        });
    }
  }

  // Digit d of number 4 i + k to row i, byte 4 d + k.
  static JET_INLINE void store_digits(Ints q, int8_t* to) {
    const __m512i digits = (__m512i)((q + 0x808080) ^ 0x808080);
    constexpr Words turn = {0x0c080400, 0x0d090501, 0x0e0a0602, 0x0f0b0703, 0x0c080400, 0x0d090501,
                            0x0e0a0602, 0x0f0b0703, 0x0c080400, 0x0d090501, 0x0e0a0602, 0x0f0b0703,
                            0x0c080400, 0x0d090501, 0x0e0a0602, 0x0f0b0703};
    alignas(64) int8_t rows[64];
    _mm512_store_si512(rows, _mm512_shuffle_epi8(digits, (__m512i)turn));
    for (int i = 0; i < 4; ++i) __builtin_memcpy(to + i * kTileBytes, rows + 16 * i, 16);
  }

  // `count` tiles of 16 rows of W in columns of group g, and where their columns begin in a tile of x. Row r of tile i
  // is at data + i * tile + r * row.
  struct Part {
    const int8_t* data;
    long tile, row, count, g, x;
  };

  // 16 rows of W times the tiles t .. t + tiles of x
  void run_block(long p0, long t, long tiles, const int8_t* x, const RowScale* scales) const {
    alignas(64) int8_t buffers[kParts][kPart * V * kTile];
    Floats total[kTotals][kTileSide];
    __builtin_memset(total, 0, tiles * sizeof(total[0]));
    const long group_parts = (columns_.group_steps + kPart - 1) / kPart, parts = columns_.groups * group_parts;
    long g = 0, part = 0;
    for (long first = 0; first < parts; first += kParts) {
      Part some[kParts];
      const long count = smaller(kParts, parts - first);
      for (long k = 0; k < count; ++k) {
        some[k] = weight_tiles(p0, g, part * kPart, buffers[k]);
        if (++part == group_parts) part = 0, ++g;
      }
      for (long j = 0; j < tiles; ++j) add_products(some, count, x + (t + j) * x_tile(), p0, total[j]);
    }
    for (long j = 0; j < tiles; ++j) {
      transpose_in_registers(total[j]);
      for (long n = (t + j) * kRowsOfX; n < smaller((t + j + 1) * kRowsOfX, p_.N); ++n) {
        const Floats* digits = total[j] + n % kRowsOfX * 4;
        const Floats q = digits[0] + 0x1p8f * (digits[1] + 0x1p8f * (digits[2] + 0x1p8f * digits[3]));
        alignas(64) float y[kBlock];
        Simd<float>::store(y, q * scales[n].first * scales[n].second);
        store_outputs<T>(p_, n, p0, y);
      }
    }
  }

  // The part of group g from its step `first` on.
  JET_INLINE Part weight_tiles(long p0, long g, long first, int8_t* buffer) const {
    const long steps = smaller(kPart, columns_.group_steps - first);
    const long at_x = (g * columns_.group_steps + first) * V * kTile;
    const Weight* w = static_cast<const Weight*>(p_.weight) + p0 * p_.weight_row;
    const long c = g * columns_.group / V + first * kTileBytes, row = p_.C / V;  // bytes
    for (long s = 0; s < steps; ++s) {
      const long ahead = c + s * kTileBytes + kAhead;  // behind the end of a row comes the next block
      const Weight* at = w + (ahead < row ? ahead : kTileSide * p_.weight_row + ahead - row);
      for (long i = 0; i < kTileSide; ++i) __builtin_prefetch(at + i * p_.weight_row);
    }
    if (p0 + kTileSide <= p_.P && c + steps * kTileBytes <= row) {
      if constexpr (Format::direct)
        return {reinterpret_cast<const int8_t*>(w + c), kTileBytes, p_.weight_row, steps, g, at_x};
      for (long i = 0; i < kTileSide; ++i)
        for (long s = 0; s < steps; ++s)
          store_row(_mm512_loadu_si512(w + i * p_.weight_row + c + s * kTileBytes), i, buffer + s * V * kTile);
    } else {  // rows after the last are taken to be the last; x is zero in columns after the last of a group
      for (long i = 0; i < kTileSide; ++i)
        for (long s = 0; s < steps; ++s) {
          const long at = c + s * kTileBytes;
          alignas(64) int8_t bytes[kTileBytes] = {};
          __builtin_memcpy(bytes, w + smaller(i, p_.P - 1 - p0) * p_.weight_row + at, smaller(kTileBytes, row - at));
          store_row(_mm512_load_si512(bytes), i, buffer + s * V * kTile);
        }
    }
    return {buffer, kTile, kTileBytes, steps * V, g, at_x};
  }

  static JET_INLINE void store_row(__m512i bytes, long i, int8_t* tiles) {
    __m512i units[V];
    Format::split(bytes, units);
    for (int v = 0; v < V; ++v) _mm512_store_si512(tiles + v * kTile + i * kTileBytes, units[v]);
  }

  // sums[k] = W X of part k
  static JET_INLINE void multiply_parts(const Part (&parts)[kParts], long count, const int8_t* x,
                                        int32_t (&sums)[kParts][kTileSums]) {
    for_constants<kParts>([&](auto k) {
      if (k >= count) return;
      const Part& part = parts[k];
      constexpr int a = 4 + k % 2, b = 6 + k % 2;
      tile_zero<k>();
      for (long i = 0; i < part.count; ++i) {
        tile_load<a>(part.data + i * part.tile, part.row);
        tile_load<b>(x + part.x + i * kTile, kTileBytes);
        tile_multiply_add_int8<k, a, b>();
      }
    });
    for_constants<kParts>([&](auto k) {
      if (k < count) tile_store<k>(sums[k], kTileBytes);
    });
  }

  // total += scale (W X) of each part
  JET_INLINE void add_products(const Part (&parts)[kParts], long count, const int8_t* x, long p0,
                               Floats (&total)[kTileSide]) const {
    alignas(64) int32_t sums[kParts][kTileSums];
    multiply_parts(parts, count, x, sums);
    const float* scales = p_.scale;
    const long P = p_.P, G = p_.G;
    for (long i = 0; i < kTileSide; ++i) {
      const float* scale = scales + smaller(p0 + i, P - 1) * G;
      Floats sum = total[i];
      for (long k = 0; k < count; ++k)
        sum += Simd<float>::all(scale[parts[k].g]) *
               __builtin_convertvector(Simd<int32_t>::load(sums[k] + i * kTileSide), Floats);
      total[i] = sum;
    }
  }

  const LinearParams& p_;
  const Columns columns_;
  const long x_tiles_;
};

}  // namespace jet::cpu::JET_CPU_ISA

#endif
