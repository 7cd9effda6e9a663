// Element types shared by the CPU and CUDA code: names, sizes, and conversions that round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

// Always inlined: this header is compiled for several instruction sets, and the linker would keep any one copy.
#define JET_CONVERT inline __attribute__((always_inline))

namespace jet {

enum class Dtype : int32_t { f32, f64, bf16, f16 };

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

JET_CONVERT float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

JET_CONVERT uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

JET_CONVERT float to_float(bf16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }

JET_CONVERT bf16 to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};  // keep NaN a NaN
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

JET_CONVERT float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Shifting exponent and mantissa into place leaves the exponent 112 too small; a power-of-two product
  // repairs it exactly and normalises subnormals on the way.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000u)));
}

JET_CONVERT f16 to_f16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // subnormal in f16: let the fp32 adder round at 2^-24
    const float rounded = bits_to_float(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (float_to_bits(rounded) - float_to_bits(0.5f)))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

JET_CONVERT float to_float(float x) { return x; }

}  // namespace jet
