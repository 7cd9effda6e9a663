#include "async_reduce.h"

#include <algorithm>
#include <cmath>

#include "tensor_float.h"

namespace hoppersim {
namespace {

float flushed(float value) { return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value; }

template <class T>
T apply(Reduce reduce, T old, T value) {
  switch (reduce) {
    case Reduce::add: return static_cast<T>(old + value);
    case Reduce::min:
      if constexpr (std::is_floating_point_v<T>) return std::fmin(old, value);
      return std::min(old, value);
    case Reduce::max:
      if constexpr (std::is_floating_point_v<T>) return std::fmax(old, value);
      return std::max(old, value);
    default: break;
  }
  if constexpr (std::is_integral_v<T>) {
    switch (reduce) {
      case Reduce::inc: return old >= value ? T{0} : static_cast<T>(old + 1);
      case Reduce::dec: return old == 0 || old > value ? value : static_cast<T>(old - 1);
      case Reduce::bit_and: return old & value;
      case Reduce::bit_or: return old | value;
      case Reduce::bit_xor: return old ^ value;
      default: break;
    }
  }
  return old;
}

// Bits is the unsigned type of the element's size; `combine` works on its bit patterns.
template <class Bits, class Combine>
void each_element(void* memory, const void* data, size_t bytes, Combine combine) {
  auto* to = static_cast<Bits*>(memory);
  for (size_t e = 0; e < bytes / sizeof(Bits); ++e) {
    Bits value, old = __atomic_load_n(to + e, __ATOMIC_RELAXED);
    std::memcpy(&value, static_cast<const uint8_t*>(data) + e * sizeof(Bits), sizeof value);
    Bits next = combine(old, value);
    while (!__atomic_compare_exchange_n(to + e, &old, next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
      next = combine(old, value);
  }
}

template <class T, class Bits>
void reduce_as(Reduce reduce, void* memory, const void* data, size_t bytes) {
  each_element<Bits>(memory, data, bytes, [reduce](Bits old, Bits value) {
    T a, b;
    std::memcpy(&a, &old, sizeof a);
    std::memcpy(&b, &value, sizeof b);
    const T c = apply(reduce, a, b);
    Bits bits;
    std::memcpy(&bits, &c, sizeof bits);
    return bits;
  });
}

}  // namespace

std::optional<Reduce> reduction_of(const Instruction& i) {
  constexpr const char* names[] = {"add", "min", "max", "inc", "dec", "and", "or", "xor"};
  for (int n = 0; n < 8; ++n)
    if (i.has(names[n])) return static_cast<Reduce>(n);
  return std::nullopt;
}

bool reduces(Reduce reduce, TensorType type) {
  using enum TensorType;
  const bool integer = type == u32 || type == s32 || type == u64 || type == s64;
  switch (reduce) {
    case Reduce::add: return integer || type == f16 || type == bf16 || type == f32 || type == f32_ftz || type == f64;
    case Reduce::min:
    case Reduce::max: return integer || type == f16 || type == bf16;
    case Reduce::inc:
    case Reduce::dec: return type == u32;
    default: return integer;
  }
}

void reduce_elements(Reduce reduce, TensorType type, void* memory, const void* data, size_t bytes) {
  switch (type) {
    case TensorType::u32: return reduce_as<uint32_t, uint32_t>(reduce, memory, data, bytes);
    case TensorType::s32:
      if (reduce == Reduce::add) return reduce_as<uint32_t, uint32_t>(reduce, memory, data, bytes);  // wraps
      return reduce_as<int32_t, uint32_t>(reduce, memory, data, bytes);
    case TensorType::u64: return reduce_as<uint64_t, uint64_t>(reduce, memory, data, bytes);
    case TensorType::s64:
      if (reduce == Reduce::add) return reduce_as<uint64_t, uint64_t>(reduce, memory, data, bytes);
      return reduce_as<int64_t, uint64_t>(reduce, memory, data, bytes);
    case TensorType::f32: return reduce_as<float, uint32_t>(reduce, memory, data, bytes);
    case TensorType::f32_ftz:
      return each_element<uint32_t>(memory, data, bytes, [](uint32_t old, uint32_t value) {
        return bits_of_float(flushed(flushed(float_of_bits(old)) + flushed(float_of_bits(value))));
      });
    case TensorType::f64: return reduce_as<double, uint64_t>(reduce, memory, data, bytes);
    case TensorType::f16:
      // fp32 has more than twice the mantissa: rounding twice is rounding once.
      return each_element<uint16_t>(memory, data, bytes, [reduce](uint16_t old, uint16_t value) {
        return half_of_float(apply(reduce, float_of_half(old), float_of_half(value)));
      });
    case TensorType::bf16:
      return each_element<uint16_t>(memory, data, bytes, [reduce](uint16_t old, uint16_t value) {
        return bf16_of_float(
            apply(reduce, float_of_element(Element::bf16, old), float_of_element(Element::bf16, value)));
      });
    default: return;
  }
}

}  // namespace hoppersim
