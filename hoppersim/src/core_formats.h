// Floating formats of up to 32 bits: exact decoding to double, encoding with every rounding of PTX.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "core.h"

namespace hoppersim {

enum class Rounding : uint32_t { nearest, zero, down, up, away };  // away: nearest, ties away from zero

struct Format {
  int exponent_bits, mantissa_bits;
  uint32_t largest, nan;  // encodings of the largest finite number and of the canonical NaN
  bool infinite;
};
constexpr Format kF16{5, 10, 0x7bff, 0x7fff, true}, kBf16{8, 7, 0x7f7f, 0x7fff, true},
    kTf32{8, 10, 0x3fbff, 0x3ffff, true};
constexpr Format kF32{8, 23, 0x7f7fffff, 0x7fffffff, true}, kE4m3{4, 3, 0x7e, 0x7f, false},
    kE5m2{5, 2, 0x7b, 0x7f, true};

inline uint32_t encode(double x, const Format& f, Rounding mode, bool saturate = false) {
  if (x != x) return f.nan;
  const uint64_t bits = std::bit_cast<uint64_t>(x);
  const uint32_t negative = bits >> 63, sign = negative << (f.exponent_bits + f.mantissa_bits);
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  uint64_t result = 0;
  if (std::isinf(x)) {
    if (saturate || !f.infinite) return sign | f.largest;
    return sign | (((1u << f.exponent_bits) - 1) << f.mantissa_bits);
  }
  if (x != 0) {
    int exponent = static_cast<int>(bits >> 52 & 0x7ff) - 1023;
    uint64_t significand = bits & ((1ull << 52) - 1);
    significand |= exponent == -1023 ? 0 : 1ull << 52;
    if (exponent == -1023) exponent = -1022;
    int drop = 52 - f.mantissa_bits;
    const bool subnormal = exponent < 1 - bias;
    if (subnormal) drop += 1 - bias - exponent;
    if (drop > 60) {  // far below half of the smallest number; only that it is not zero matters
      significand = 1;
      drop = 2;
    }
    const uint64_t rest = significand & ((1ull << drop) - 1), half = 1ull << (drop - 1);
    uint64_t kept = significand >> drop;
    const bool up = mode == Rounding::nearest ? rest > half || (rest == half && (kept & 1))
                    : mode == Rounding::away  ? rest >= half
                    : mode == Rounding::down  ? negative && rest
                    : mode == Rounding::up    ? !negative && rest
                                              : false;
    kept += up;
    result = subnormal ? kept : (static_cast<uint64_t>(exponent + bias - 1) << f.mantissa_bits) + kept;
  }
  if (result > f.largest) {
    const bool to_infinity = mode == Rounding::nearest || mode == Rounding::away ||
                             (mode == Rounding::down && negative) || (mode == Rounding::up && !negative);
    result = saturate || !f.infinite || !to_infinity ? f.largest : ((1u << f.exponent_bits) - 1) << f.mantissa_bits;
  }
  return sign | static_cast<uint32_t>(result);
}

inline double decode(uint32_t bits, const Format& f) {
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const uint32_t magnitude = bits & ((1u << (f.exponent_bits + f.mantissa_bits)) - 1);
  const bool negative = bits >> (f.exponent_bits + f.mantissa_bits) & 1;
  const int exponent = static_cast<int>(magnitude >> f.mantissa_bits);
  const uint32_t mantissa = magnitude & ((1u << f.mantissa_bits) - 1);
  double value;
  if (magnitude > f.largest) {
    const bool infinity = f.infinite && mantissa == 0;
    value = infinity ? std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    value = std::ldexp(mantissa, 1 - bias - f.mantissa_bits);
  } else {
    value = std::ldexp(mantissa + (1u << f.mantissa_bits), exponent - bias - f.mantissa_bits);
  }
  return negative ? -value : value;
}

// a * b + c rounded to odd in double: rounding it once more, to 24 bits or fewer, gives the correctly rounded result.
// The product of two numbers of at most 24 bits is exact in double.
inline double fma_to_odd(double a, double b, double c) {
  const double product = a * b, sum = product + c;
  if (!std::isfinite(sum)) return sum;
  const double rounded_c = sum - product;
  const double error = (product - (sum - rounded_c)) + (c - rounded_c);
  uint64_t bits = std::bit_cast<uint64_t>(sum);
  if (error == 0 || (bits & 1)) return sum;
  bits += (error > 0) == (sum > 0) ? 1 : -1;
  return std::bit_cast<double>(bits);
}

}  // namespace hoppersim
