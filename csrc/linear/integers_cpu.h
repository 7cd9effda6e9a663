// Weights of 8 and 4 bits times x as integers of 30 bits, for the few rows for which x is cheap to convert and sums fit
// the registers:
//
//   x = 2^(m - 28) (2^15 high + low)     2^m <= max |x| < 2^(m + 1), of a row of x; |high|, |low| <= 2^14
//   y = sum over groups of scale 2^(m - 28) (2^15 sum(high w) + sum(low w))
//
// The sums of integers are exact. x is exact where |x| >= 2^-20 max |x|, which has 8 bits (bf16) or at least
// 2^-17 max |x|, which has 11 (fp16); elsewhere its error is at most 2^-29 max |x|. A row with an infinity or NaN has
// no such form and is computed as numbers.
#pragma once

#include "csrc/linear/columns_cpu.h"
#include "csrc/linear/formats_cpu.h"
#include "csrc/linear/vectors_cpu.h"

#if defined(__AVX2__)

namespace jet::cpu::JET_CPU_ISA {

using Shorts = Vector<int16_t>;
constexpr long kShorts = Simd<int16_t>::lanes;

#if defined(__AVX512F__)
inline bool has_vnni_instructions() { return __builtin_cpu_supports("avx512vnni"); }
#else
inline bool has_vnni_instructions() { return false; }
#endif

// c + a0 b0 + a1 b1 for the pairs of 16-bit integers in each word
template <bool vnni>
JET_INLINE Ints multiply_add_pairs(Shorts a, Shorts b, Ints c) {
#if defined(__AVX512F__)
  if constexpr (vnni) {
    asm("vpdpwssd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
  return c + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  return c + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
}

JET_INLINE Ints rounded(Floats x) {
#if defined(__AVX512F__)
  return (Ints)_mm512_maskz_cvtps_epi32(0xffff, (__m512)x);
#else
  return (Ints)_mm256_cvtps_epi32((__m256)x);
#endif
}

inline float power_of_two(int exponent) {
  const int32_t bits = (exponent + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return power;
}

// A row of x as q 2^(m - 28). Powers of two are products of two, because they may be no fp32.
template <class T>
class IntegerRow {
  static constexpr int L = Simd<float>::lanes;

 public:
  IntegerRow(const LinearParams& p, long n) : x_(static_cast<const T*>(p.x) + n * p.x_row), stride_(p.x_column) {
    Ints most{};
    for (long c = 0; c < p.C; c += L) {
      const Ints bits = (Ints)load_some(x_ + c * stride_, stride_, p.C - c) & 0x7fffffff;
      most = bits > most ? bits : most;
    }
    int32_t largest = 0;  // the bits of max |x|; of an infinity or NaN where there is one
    for (int i = 0; i < L; ++i) largest = most[i] > largest ? most[i] : largest;
    is_finite = largest < 0x7f800000;
    const int shift = 28 + 127 - int(larger(largest >> 23, 1));  // 28 - m
    first_ = shift / 2, second_ = shift - shift / 2;
  }

  // q of the columns c, c + 1, ..; zeros after the first n
  JET_INLINE Ints at(long c, long n) const {
    const Floats x = load_some(x_ + c * stride_, stride_, n);
    return is_finite ? rounded(x * power_of_two(first_) * power_of_two(second_)) : Ints{};
  }

  struct Scale {  // 2^(m - 28)
    bool is_finite;
    float first, second;
  };
  Scale scale() const { return {is_finite, power_of_two(-first_), power_of_two(-second_)}; }

  bool is_finite;

 private:
  const T* x_;
  long stride_;
  int first_, second_;
};

// The rows that are not finite, in the format `Numbers`.
template <class Numbers, class T>
void run_rows_of_numbers(const LinearParams& p, const typename IntegerRow<T>::Scale* scales, const Parallel& parallel) {
  for (long n = 0; n < p.N; ++n) {
    if (scales[n].is_finite) continue;
    LinearParams row = p;
    row.N = 1;
    row.x = static_cast<const T*>(p.x) + n * p.x_row;
    row.y = static_cast<T*>(p.y) + n * p.P;
    VectorLinear<Numbers, T, true>(row).run(parallel);
  }
}

// kShorts bytes as 16-bit integers
template <class Byte>
JET_INLINE Shorts widen_bytes(const Byte* p) {
#if defined(__AVX512F__)
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (Byte(-1) < 0) return (Shorts)_mm512_maskz_cvtepi8_epi16(~0u, bytes);
  return (Shorts)_mm512_maskz_cvtepu8_epi16(~0u, bytes);
#else
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  if constexpr (Byte(-1) < 0) return (Shorts)_mm256_cvtepi8_epi16(bytes);
  return (Shorts)_mm256_cvtepu8_epi16(bytes);
#endif
}

// Lane i of vector v holds column `vectors` i + v, plus `offset`. Where a step has no more columns, x is zero.
struct Int8Shorts {
  using Weight = int8_t;
  static constexpr int vectors = 1, offset = 0;
  static JET_INLINE void split(Shorts bytes, Shorts (&units)[1]) { units[0] = bytes; }
};

struct Int4Shorts {
  using Weight = uint8_t;
  static constexpr int vectors = 2, offset = 8;
  static JET_INLINE void split(Shorts bytes, Shorts (&units)[2]) {
    units[0] = bytes & 15;
    units[1] = bytes >> 4;
  }
};

// `Numbers` is the format for rows that are not finite.
template <class Format, class Numbers, class T, bool vnni>
class IntegerLinear {
  using Weight = typename Format::Weight;
  using RowScale = typename IntegerRow<T>::Scale;
  static constexpr int V = Format::vectors;
  static constexpr long kStepUnits = 2 * V * kShorts;  // of x: `high` in V vectors, then `low`
  // Steps that a sum in 32 bits can take: each adds at most 2 2^14 2^7 V to it, and takes 2 2^14 2^4 V off it before.
  static constexpr long kMostSteps = 128;
  static constexpr long kLineSteps = 64 / kShorts;  // of a cache line of W
  static constexpr int L = Simd<float>::lanes;

 public:
  explicit IntegerLinear(const LinearParams& p)
      : p_(p),
        columns_(p, V * kShorts),
        parts_((columns_.group_steps + kMostSteps - 1) / kMostSteps),
        row_units_(columns_.steps() * kStepUnits),
        row_starts_(2 * columns_.groups * parts_) {}

  void run(const Parallel& parallel) const {
    const Buffer<int16_t> units(p_.N * row_units_);
    const Buffer<Ints> starts(p_.N * row_starts_);
    const Buffer<RowScale> scales(p_.N);
    const X x = {units.get(), starts.get(), scales.get()};
    run_even_tasks(for_work(parallel, kCopy * double(p_.N) * p_.C), larger(1, parallel.threads), p_.N,
                   [&](long, long n) { pack_row(n, x); });
    run_blocks(p_, for_work(parallel, double(p_.N) * p_.C * p_.P), [&](long p0) { run_block(p0, x); });
    run_rows_of_numbers<Numbers, T>(p_, scales.get(), parallel);
  }

 private:
  struct X {
    int16_t* units;    // [N, steps, 2, V, kShorts]
    Ints* starts;      // [N, groups, parts, 2]: minus the sum of what `offset` adds
    RowScale* scales;  // [N]
  };

  void pack_row(long n, const X& to) const {
    const IntegerRow<T> x(p_, n);
    to.scales[n] = x.scale();
    Ints* starts = to.starts + n * row_starts_;
    for (long i = 0; i < row_starts_; ++i) starts[i] = Ints{};
    for (long g = 0; g < columns_.groups; ++g)
      columns_.for_steps(g, [&](long c, long count, long step) {
        alignas(64) int16_t digits[2][V * kShorts];
        for (long i = 0; i < V * kShorts; i += L) {
          const Ints q = x.at(c + i, count - i);
          const Ints high = (q + (1 << 14)) >> 15;
          store_halves(digits[0] + i, (Words)high);
          store_halves(digits[1] + i, (Words)(q - (high << 15)));
        }
        int16_t* units = to.units + n * row_units_ + step * kStepUnits;
        Ints* start = starts + 2 * (g * parts_ + (step - g * columns_.group_steps) / kMostSteps);
        for (int d = 0; d < 2; ++d) {
          arrange(digits[d], units + d * V * kShorts);
          for (int v = 0; v < V && Format::offset != 0; ++v)
            start[d] = multiply_add_pairs<vnni>(Simd<int16_t>::load(units + (d * V + v) * kShorts),
                                                Simd<int16_t>::all(-Format::offset), start[d]);
        }
      });
  }

  // Columns as they are in x to those of the vectors of W.
  static JET_INLINE void arrange(const int16_t* digits, int16_t* units) {
    if constexpr (V == 1) {
      Simd<int16_t>::store(units, Simd<int16_t>::load(digits));
    } else {
      for (long i = 0; i < kShorts; i += L) {
        Words pairs;
        __builtin_memcpy(&pairs, digits + 2 * i, sizeof(pairs));
        store_halves(units + i, pairs);
        store_halves(units + kShorts + i, pairs >> 16);
      }
    }
  }

  // Tiles of rows of W x rows of x that fill the registers.
  void run_block(long p0, const X& x) const {
    long n = 0;
    if constexpr (kRegisters == 32) {
      for (; n + 4 <= p_.N; n += 4) run_rows<2, 4>(p0, n, x);
      if (n + 3 <= p_.N) run_rows<2, 3>(p0, n, x), n += 3;
      if (n + 2 <= p_.N) run_rows<4, 2>(p0, n, x), n += 2;
    } else {
      for (; n + 2 <= p_.N; n += 2) run_rows<2, 2>(p0, n, x);
    }
    if (n < p_.N) run_rows<4, 1>(p0, n, x);
  }

  // R rows of x from n on.
  template <int O, int R>
  void run_rows(long p0, long n, const X& x) const {
    Floats sums[R][kBlock];
    for (long o = 0; o < kBlock; o += O) run_tile<O, R>(p0 + o, n, x, &sums[0][o]);
    for (int r = 0; r < R; ++r) {
      alignas(64) float y[kBlock];
      const RowScale& scale = x.scales[n + r];
      for (long i = 0; i < kBlock; i += L) {
        Floats rows[L];
        for (int j = 0; j < L; ++j) rows[j] = sums[r][i + j];
        transpose_in_registers(rows);
        Floats sum = rows[0];
        for (int j = 1; j < L; ++j) sum += rows[j];
        Simd<float>::store(y + i, sum * scale.first * scale.second);
      }
      store_outputs<T>(p_, n + r, p0, y);
    }
  }

  // sums[r][o], in a vector whose lanes are to be added; rows of W after the last are taken to be the last, and nobody
  // reads their sums
  template <int O, int R>
  JET_INLINE void run_tile(long p0, long n, const X& x, Floats* sums) const {
    const Weight *w[O], *next[O];  // and of the next tile
    const float* scales[O];
    for (int o = 0; o < O; ++o) {
      const long p = smaller(p0 + o, p_.P - 1);
      w[o] = static_cast<const Weight*>(p_.weight) + p * p_.weight_row;
      next[o] = w[o] + O * p_.weight_row;
      scales[o] = p_.scale + p * p_.G;
    }
    const int16_t* units = x.units + n * row_units_;
    const Ints* starts = x.starts + n * row_starts_;
    Floats total[O][R] = {};
    for (long g = 0; g < columns_.groups; ++g) {
      for (long part = 0; part < parts_; ++part, starts += 2) {
        Ints acc[O][R][2];
#pragma GCC unroll 4
        for (int o = 0; o < O; ++o)
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r)
            for (int d = 0; d < 2; ++d) acc[o][r][d] = Format::offset != 0 ? starts[r * row_starts_ + d] : Ints{};
        const long begin = part * kMostSteps, end = smaller(begin + kMostSteps, columns_.group_steps);
        const long whole = smaller(end, columns_.whole_steps);
        long c = (g * columns_.group + begin * columns_.width) / V;  // bytes
        for (long s = begin; s < whole; s += kLineSteps) {
#pragma GCC unroll 4
          for (int o = 0; o < O; ++o) __builtin_prefetch(next[o] + c);
          for (long i = 0; i < smaller(kLineSteps, whole - s); ++i, units += kStepUnits, c += kShorts)
            multiply<O, R>(w, c, units, acc);
        }
        if (end > columns_.whole_steps) {
          Weight last[O][kShorts] = {};
          const Weight* at[O];
          for (int o = 0; o < O; ++o) {
            __builtin_memcpy(last[o], w[o] + c, (columns_.group - columns_.whole_steps * columns_.width) / V);
            at[o] = last[o];
          }
          multiply<O, R>(at, 0, units, acc);
          units += kStepUnits;
        }
#pragma GCC unroll 4
        for (int o = 0; o < O; ++o) {
          const Floats scale = Simd<float>::all(scales[o][g]);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r)
            total[o][r] += scale * (__builtin_convertvector(acc[o][r][0], Floats) * 0x1p15f +
                                    __builtin_convertvector(acc[o][r][1], Floats));
        }
      }
    }
    for (int o = 0; o < O; ++o)
      for (int r = 0; r < R; ++r) sums[r * kBlock + o] = total[o][r];
  }

  // acc[o][r] += w[o] x[r] of the step at byte c of w[o], for the high and the low part of x
  template <int O, int R>
  JET_INLINE void multiply(const Weight* const (&w)[O], long c, const int16_t* x, Ints (&acc)[O][R][2]) const {
    Shorts units[O][V];
#pragma GCC unroll 4
    for (int o = 0; o < O; ++o) Format::split(widen_bytes(w[o] + c), units[o]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int d = 0; d < 2; ++d)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const Shorts xs = Simd<int16_t>::load(x + r * row_units_ + (d * V + v) * kShorts);
#pragma GCC unroll 4
          for (int o = 0; o < O; ++o) acc[o][r][d] = multiply_add_pairs<vnni>(units[o][v], xs, acc[o][r][d]);
        }
  }

  const LinearParams& p_;
  const Columns columns_;
  const long parts_, row_units_, row_starts_;
};

}  // namespace jet::cpu::JET_CPU_ISA

#endif
