// Weights of 8 and 4 bits times x as integers, for the few rows for which x is cheap to convert and sums fit the
// registers. An integer is some digits, each of which is multiplied by the weights as bytes or 16-bit numbers:
//
//   x = 2^(m - bits) sum over d of 2^(width d) digit_d     2^m <= max |x| < 2^(m + 1), of a row of x
//   y = sum over groups of scale 2^(m - bits) sum over d of 2^(width d) sum(digit_d w)
//
// The sums of integers are exact. The error of x is at most 2^(-bits - 1) max |x|, and none where |x| has no bits below
// 2^(m - bits). A row with an infinity or NaN has no such form and is computed as numbers.
#pragma once

#include "csrc/linear/columns_cpu.h"
#include "csrc/linear/formats_cpu.h"
#include "csrc/linear/vectors_cpu.h"

#if defined(__AVX2__)

namespace jet::cpu::JET_CPU_ISA {

#if defined(__AVX512F__)
inline bool has_vnni_instructions() { return __builtin_cpu_supports("avx512vnni"); }
#endif

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

// A row of x as q 2^(m - bits), |q| <= 2^(bits + 1). Powers of two are products of two, because they may be no fp32.
template <class T>
class IntegerRow {
  static constexpr int L = Simd<float>::lanes;

 public:
  IntegerRow(const LinearParams& p, long n, int bits)
      : x_(static_cast<const T*>(p.x) + n * p.x_row), stride_(p.x_column) {
    Ints most{};
    for (long c = 0; c < p.C; c += L) {
      const Ints bits = (Ints)load_some(x_ + c * stride_, stride_, p.C - c) & 0x7fffffff;
      most = bits > most ? bits : most;
    }
    int32_t largest = 0;  // the bits of max |x|; of an infinity or NaN where there is one
    for (int i = 0; i < L; ++i) largest = most[i] > largest ? most[i] : largest;
    is_finite = largest < 0x7f800000;
    const int shift = bits + 127 - int(larger(largest >> 23, 1));  // bits - m
    first_ = shift / 2, second_ = shift - shift / 2;
  }

  // q of the columns c, c + 1, ..; zeros after the first n
  JET_INLINE Ints at(long c, long n) const {
    const Floats x = load_some(x_ + c * stride_, stride_, n);
    return is_finite ? rounded(x * power_of_two(first_) * power_of_two(second_)) : Ints{};
  }

  struct Scale {  // 2^(m - bits)
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

// Two digits of 15 bits, and weights as 16-bit integers.
struct ShortDigits {
  using Digit = int16_t;
  using Digits = Vector<Digit>;
  static constexpr int count = 2, width = 15, bits = 28, offset = 0;
  static constexpr long lanes = Simd<Digit>::lanes;
  static constexpr long most_steps = 128;  // that a sum takes: each adds at most 2 2^14 2^7 V, the start 2 2^14 2^4 V

  static JET_INLINE void split(Ints q, Ints (&digits)[count]) {
    digits[1] = (q + (1 << 14)) >> 15;
    digits[0] = q - (digits[1] << 15);
  }
  static JET_INLINE void store(Digit* to, Ints digits) { store_halves(to, (Words)digits); }

  // `lanes` bytes, plus `offset`
  template <class Byte>
  static JET_INLINE Digits load(const Byte* p) {
#if defined(__AVX512F__)
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (Byte(-1) < 0) return (Digits)_mm512_maskz_cvtepi8_epi16(~0u, bytes);
    return (Digits)_mm512_maskz_cvtepu8_epi16(~0u, bytes);
#else
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (Byte(-1) < 0) return (Digits)_mm256_cvtepi8_epi16(bytes);
    return (Digits)_mm256_cvtepu8_epi16(bytes);
#endif
  }

  // c + the products of the pairs in each word
  static JET_INLINE Ints multiply_add(Digits w, Digits x, Ints c) {
#if defined(__AVX512F__)
    return c + (Ints)_mm512_madd_epi16((__m512i)w, (__m512i)x);
#else
    return c + (Ints)_mm256_madd_epi16((__m256i)w, (__m256i)x);
#endif
  }
};

#if defined(__AVX512F__)

// Three digits of 8 bits, and weights as bytes, which vpdpbusd takes without a sign.
struct ByteDigits {
  using Digit = int8_t;
  using Digits = Vector<Digit>;
  static constexpr int count = 3, width = 8, bits = 21, offset = 128;
  static constexpr long lanes = Simd<Digit>::lanes;
  static constexpr long most_steps = 4096;  // each adds at most 4 2^7 2^8 V

  static JET_INLINE void split(Ints q, Ints (&digits)[count]) {
    for (int d = 0; d < count; ++d) {
      digits[d] = q << 24 >> 24;
      q = (q - digits[d]) >> 8;
    }
  }
  static JET_INLINE void store(Digit* to, Ints digits) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)digits));
  }

  template <class Byte>
  static JET_INLINE Digits load(const Byte* p) {
    const Digits bytes = (Digits)_mm512_loadu_si512(p);
    if constexpr (Byte(-1) < 0) return bytes ^ Simd<Digit>::all(-128);
    return bytes;
  }

  // c + the products of the fours in each word; w without a sign
  static JET_INLINE Ints multiply_add(Digits w, Digits x, Ints c) {
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(w), "v"(x));
    return c;
  }
};

#endif

// Weights as `vectors` vectors of digits: lane i of vector v holds column `vectors` i + v, plus `offset`. Where a step
// has no more columns, x is zero.
template <class Digits>
struct Int8Digits {
  using Weight = int8_t;
  static constexpr int vectors = 1, offset = Digits::offset;
  static JET_INLINE void load(const int8_t* w, typename Digits::Digits (&units)[1]) { units[0] = Digits::load(w); }
};

template <class Digits>
struct Int4Digits {
  using Weight = uint8_t;
  static constexpr int vectors = 2, offset = 8;
  static JET_INLINE void load(const uint8_t* w, typename Digits::Digits (&units)[2]) {
    const Words bytes = (Words)Digits::load(w);
    constexpr Words low = Words{} + (sizeof(typename Digits::Digit) == 1 ? 0x0f0f0f0fu : 0x000f000fu);
    units[0] = (typename Digits::Digits)(bytes & low);
    units[1] = (typename Digits::Digits)(bytes >> 4 & low);
  }
};

// `Numbers` is the format for rows that are not finite.
template <class Digits, template <class> class Format, class Numbers, class T>
class IntegerLinear {
  using W = Format<Digits>;
  using Weight = typename W::Weight;
  using Digit = typename Digits::Digit;
  using Vec = typename Digits::Digits;
  using RowScale = typename IntegerRow<T>::Scale;
  static constexpr int V = W::vectors, D = Digits::count;
  static constexpr long kLanes = Digits::lanes;
  static constexpr long kStepUnits = D * V * kLanes;  // of x: V vectors of each digit
  static constexpr long kMostSteps = Digits::most_steps;
  static constexpr long kLineSteps = 64 / kLanes;  // of a cache line of W
  static constexpr int L = Simd<float>::lanes;

 public:
  explicit IntegerLinear(const LinearParams& p)
      : p_(p),
        columns_(p, V * kLanes),
        parts_((columns_.group_steps + kMostSteps - 1) / kMostSteps),
        row_units_(columns_.steps() * kStepUnits),
        row_starts_(D * columns_.groups * parts_) {}

  void run(const Parallel& parallel) const {
    const Buffer<Digit> units(p_.N * row_units_);
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
    Digit* units;      // [N, steps, D, V, kLanes]
    Ints* starts;      // [N, groups, parts, D]: minus the sum of what `offset` adds
    RowScale* scales;  // [N]
  };

  void pack_row(long n, const X& to) const {
    const IntegerRow<T> x(p_, n, Digits::bits);
    to.scales[n] = x.scale();
    Ints* starts = to.starts + n * row_starts_;
    for (long i = 0; i < row_starts_; ++i) starts[i] = Ints{};
    for (long g = 0; g < columns_.groups; ++g)
      columns_.for_steps(g, [&](long c, long count, long step) {
        alignas(64) Digit digits[D][V * kLanes];
        for (long i = 0; i < V * kLanes; i += L) {
          Ints some[D];
          Digits::split(x.at(c + i, count - i), some);
          for (int d = 0; d < D; ++d) Digits::store(digits[d] + i, some[d]);
        }
        Digit* units = to.units + n * row_units_ + step * kStepUnits;
        Ints* start = starts + D * (g * parts_ + (step - g * columns_.group_steps) / kMostSteps);
        for (int d = 0; d < D; ++d) {
          arrange(digits[d], units + d * V * kLanes);
          for (int v = 0; v < V && W::offset != 0; ++v) {
            const Vec x = Simd<Digit>::load(units + (d * V + v) * kLanes);
            start[d] -= Digits::multiply_add(Simd<Digit>::all(Digit(W::offset)), x, Ints{});
          }
        }
      });
  }

  // Columns as they are in x to those of the vectors of W.
  static JET_INLINE void arrange(const Digit* digits, Digit* units) {
    for (long i = 0; i < kLanes; ++i)
      for (int v = 0; v < V; ++v) units[v * kLanes + i] = digits[V * i + v];
  }

  // Tiles of rows of W x rows of x that fill the registers.
  void run_block(long p0, const X& x) const {
    long n = 0;
    if constexpr (kRegisters == 32) {
      for (; n + 4 <= p_.N; n += 4) run_rows<2, 4>(p0, n, x);
      if (n + 3 <= p_.N) run_rows<2, 3>(p0, n, x), n += 3;
      if (n + 2 <= p_.N) run_rows<4, 2>(p0, n, x), n += 2;
      if (n < p_.N) run_rows<8, 1>(p0, n, x);
    } else {
      for (; n + 2 <= p_.N; n += 2) run_rows<2, 2>(p0, n, x);
      if (n < p_.N) run_rows<4, 1>(p0, n, x);
    }
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
    const Digit* units = x.units + n * row_units_;
    const Ints* starts = x.starts + n * row_starts_;
    Floats total[O][R] = {};
    for (long g = 0; g < columns_.groups; ++g) {
      for (long part = 0; part < parts_; ++part, starts += D) {
        Ints acc[O][R][D];
#pragma GCC unroll 8
        for (int o = 0; o < O; ++o)
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
            for (int d = 0; d < D; ++d) acc[o][r][d] = W::offset != 0 ? starts[r * row_starts_ + d] : Ints{};
        const long begin = part * kMostSteps, end = smaller(begin + kMostSteps, columns_.group_steps);
        const long whole = smaller(end, columns_.whole_steps);
        long c = (g * columns_.group + begin * columns_.width) / V;  // bytes
        for (long s = begin; s < whole; s += kLineSteps) {
#pragma GCC unroll 8
          for (int o = 0; o < O; ++o) __builtin_prefetch(next[o] + c);
          for (long i = 0; i < smaller(kLineSteps, whole - s); ++i, units += kStepUnits, c += kLanes)
            multiply<O, R>(w, c, units, acc);
        }
        if (end > columns_.whole_steps) {
          Weight last[O][kLanes] = {};
          const Weight* at[O];
          for (int o = 0; o < O; ++o) {
            __builtin_memcpy(last[o], w[o] + c, (columns_.group - columns_.whole_steps * columns_.width) / V);
            at[o] = last[o];
          }
          multiply<O, R>(at, 0, units, acc);
          units += kStepUnits;
        }
#pragma GCC unroll 8
        for (int o = 0; o < O; ++o) {
          const Floats scale = Simd<float>::all(scales[o][g]);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            Floats sum = __builtin_convertvector(acc[o][r][D - 1], Floats);
#pragma GCC unroll 2
            for (int d = D - 2; d >= 0; --d)
              sum = sum * float(1 << Digits::width) + __builtin_convertvector(acc[o][r][d], Floats);
            total[o][r] += scale * sum;
          }
        }
      }
    }
    for (int o = 0; o < O; ++o)
      for (int r = 0; r < R; ++r) sums[r * kBlock + o] = total[o][r];
  }

  // acc[o][r] += w[o] x[r] of the step at byte c of w[o], for each digit of x
  template <int O, int R>
  JET_INLINE void multiply(const Weight* const (&w)[O], long c, const Digit* x, Ints (&acc)[O][R][D]) const {
    // One row of x needs a weight once: its loads and those of x are what is kept of a step.
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      Vec units[V];
      W::load(w[o] + c, units);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
        for (int d = 0; d < D; ++d)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v)
            acc[o][r][d] = Digits::multiply_add(units[v], Simd<Digit>::load(x + r * row_units_ + (d * V + v) * kLanes),
                                                acc[o][r][d]);
    }
  }

  const LinearParams& p_;
  const Columns columns_;
  const long parts_, row_units_, row_starts_;
};

}  // namespace jet::cpu::JET_CPU_ISA

#endif
