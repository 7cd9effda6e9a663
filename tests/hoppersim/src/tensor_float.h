// Conversions between the 16-bit and tf32 operand formats of the tensor cores and float.
#pragma once

#include <cstdint>
#include <cstring>

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
  if (magnitude < 0x38800000u) {                       // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    return sign | static_cast<uint16_t>(bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u);
  }
  magnitude += 0xfff + (magnitude >> 13 & 1);
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u) >> 13);
}

enum class Element : uint8_t { f16, bf16, tf32 };

inline float float_of_element(Element element, uint16_t bits) {
  return element == Element::f16 ? float_of_half(bits) : float_of_bits(static_cast<uint32_t>(bits) << 16);
}

// The tensor cores ignore the 13 low mantissa bits of a tf32 operand.
inline float float_of_tf32(uint32_t bits) { return float_of_bits(bits & 0xffffe000u); }

}  // namespace hoppersim
