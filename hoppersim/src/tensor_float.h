// Operand formats of the tensor cores, and their conversions to and from float.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

#include "core_formats.h"

namespace hoppersim {

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of_half(uint16_t half) {
  uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13;
  float magnitude = float_of_bits(bits) * 0x1p112f;  // moves the exponent bias from 15 to 127; right for subnormals too
  if ((half & 0x7c00) == 0x7c00) magnitude = float_of_bits(0x7f800000u | bits);
  return float_of_bits(bits_of_float(magnitude) | static_cast<uint32_t>(half & 0x8000) << 16);
}

// Round to nearest even; NaN becomes 0x7fff as the GPU's conversions do.
inline uint16_t half_of_float(float value) {
  uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffffu;
  uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    return sign | static_cast<uint16_t>(bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u);
  }
  magnitude += 0xfff + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u) >> 13);
}

// Likewise.
inline uint16_t bf16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

enum class Element : uint8_t { f16, bf16, tf32, e4m3, e5m2, s8, u8, s4, u4, b1, f64 };

constexpr int bits_of(Element element) {
  switch (element) {
    case Element::f16:
    case Element::bf16: return 16;
    case Element::tf32: return 32;
    case Element::s4:
    case Element::u4: return 4;
    case Element::b1: return 1;
    case Element::f64: return 64;
    default: return 8;
  }
}
constexpr bool is_integer(Element element) { return element >= Element::s8 && element <= Element::b1; }
constexpr bool is_fp8(Element element) { return element == Element::e4m3 || element == Element::e5m2; }

inline std::optional<Element> element_named(const std::string& name) {
  constexpr const char* names[] = {"f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8", "s4", "u4", "b1", "f64"};
  for (int e = 0; e < 11; ++e) {
    if (name == names[e]) return static_cast<Element>(e);
  }
  return std::nullopt;
}

inline float float_of_fp8(const Format& format, uint8_t bits) {
  struct Table {
    std::array<float, 256> values;
    explicit Table(const Format& f) {
      for (uint32_t b = 0; b < 256; ++b) values[b] = static_cast<float>(decode(b, f));
    }
  };
  static const Table e4m3(kE4m3), e5m2(kE5m2);
  return (format.exponent_bits == kE4m3.exponent_bits ? e4m3 : e5m2).values[bits];
}

// The tensor cores ignore the 13 low mantissa bits of a tf32 operand.
inline float float_of_tf32(uint32_t bits) { return float_of_bits(bits & 0xffffe000u); }

// The value of an operand element of up to 32 bits; integers are exact in a float.
inline float float_of_element(Element element, uint32_t bits) {
  switch (element) {
    case Element::f16: return float_of_half(static_cast<uint16_t>(bits));
    case Element::bf16: return float_of_bits(bits << 16);
    case Element::tf32: return float_of_tf32(bits);
    case Element::e4m3: return float_of_fp8(kE4m3, static_cast<uint8_t>(bits));
    case Element::e5m2: return float_of_fp8(kE5m2, static_cast<uint8_t>(bits));
    case Element::s8: return static_cast<int8_t>(bits);
    case Element::u8: return static_cast<uint8_t>(bits);
    case Element::s4: return static_cast<int8_t>(bits << 4) >> 4;
    case Element::u4: return static_cast<float>(bits & 15);
    default: return static_cast<float>(bits & 1);
  }
}

// Element `index` of a 32-bit register that is filled with them, the first in the low bits.
inline float element_of_word(Element element, uint32_t word, int index) {
  const int bits = bits_of(element);
  return float_of_element(element, bits == 32 ? word : word >> bits * index & ((1u << bits) - 1));
}

// d + sum, wrapping or clamped to s32.
inline uint32_t add_s32(uint32_t d, int64_t sum, bool saturate) {
  const int64_t wide = static_cast<int64_t>(static_cast<int32_t>(d)) + sum;
  if (!saturate) return static_cast<uint32_t>(wide);
  return static_cast<uint32_t>(static_cast<int32_t>(wide > INT32_MAX   ? INT32_MAX
                                                    : wide < INT32_MIN ? INT32_MIN
                                                                       : wide));
}

}  // namespace hoppersim
