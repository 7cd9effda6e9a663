// cvt in every combination of integers, f16, bf16, tf32, f32, f64, and the packed forms; exact.
#include <algorithm>
#include <cmath>

#include "core_apply.h"
#include "core_formats.h"
#include "ptx_parser.h"
#include "tensor_float.h"

namespace hoppersim {

namespace {

enum Flag : uint32_t { flush = 1, saturate = 2, finite = 4, relu = 8, to_integral = 16 };

bool is_signed(Type t) { return t == Type::s8 || t == Type::s16 || t == Type::s32 || t == Type::s64; }
bool is_integer(Type t) { return t >= Type::u8 && t <= Type::s64; }

const Format& format_of(Type t) {
  return t == Type::f16 ? kF16 : t == Type::bf16 ? kBf16 : t == Type::tf32 ? kTf32 : kF32;
}

Rounding rounding_of(const Instruction& i) {
  if (i.has("rz") || i.has("rzi")) return Rounding::zero;
  if (i.has("rm") || i.has("rmi")) return Rounding::down;
  if (i.has("rp") || i.has("rpi")) return Rounding::up;
  return i.has("rna") ? Rounding::away : Rounding::nearest;
}

double integral(double x, Rounding mode) {
  switch (mode) {
    case Rounding::zero: return std::trunc(x);
    case Rounding::down: return std::floor(x);
    case Rounding::up: return std::ceil(x);
    case Rounding::away: return std::round(x);
    default: return std::nearbyint(x);
  }
}

// The integer a register's low bits stand for.
__int128 integer_in(uint64_t bits, Type t) {
  const int shift = 64 - bits_of(t);
  return is_signed(t) ? __int128(static_cast<int64_t>(bits << shift) >> shift) : __int128(bits << shift >> shift);
}

double float_in(uint64_t bits, Type t, uint32_t flags) {
  if (t == Type::f64) return from_bits<double>(bits);
  const Format& f = format_of(t);
  double x = t == Type::f32 ? from_bits<float>(bits) : decode(static_cast<uint32_t>(bits) & 0xffff, f);
  if (flags & flush && t == Type::f32 && std::abs(x) < std::numeric_limits<float>::min()) x = std::copysign(0.0, x);
  return x;
}

// To double with the asked rounding; `odd`: to odd, for a further rounding to a narrower format.
double integer_to_double(__int128 v, Rounding mode, bool odd) {
  double d = static_cast<double>(v);
  const __int128 back = static_cast<__int128>(d);
  if (back == v) return d;
  const double below = back < v ? d : std::nextafter(d, -INFINITY), above = back < v ? std::nextafter(d, INFINITY) : d;
  if (odd) return to_bits(below) & 1 ? below : above;
  switch (mode) {
    case Rounding::zero: return v < 0 ? above : below;
    case Rounding::down: return below;
    case Rounding::up: return above;
    default: return d;
  }
}

uint64_t integer_out(__int128 v, Type t, bool clamp) {
  const int bits = bits_of(t);
  if (clamp) {
    const __int128 low = is_signed(t) ? -(__int128(1) << (bits - 1)) : 0;
    const __int128 high = is_signed(t) ? (__int128(1) << (bits - 1)) - 1 : (__int128(1) << bits) - 1;
    v = std::clamp(v, low, high);
  }
  return static_cast<uint64_t>(integer_in(static_cast<uint64_t>(v), t));
}

uint64_t float_to_integer(double x, Type from, Type to, Rounding mode) {
  if (x != x) {
    const bool wide = from == Type::f64 || to == Type::s64 || to == Type::u64;
    return wide ? 1ull << (bits_of(to) - 1) : 0;
  }
  x = std::clamp(integral(x, mode), -0x1p100, 0x1p100);
  return integer_out(static_cast<__int128>(x), to, true);
}

uint64_t float_out(double x, Type t, Rounding mode, uint32_t flags) {
  if (flags & saturate) x = x > 0 ? std::min(x, 1.0) : 0.0;
  if (flags & relu && x == x) x = x > 0 ? x : 0.0;
  if (t == Type::f64) return to_bits(x);
  uint32_t bits = encode(x, format_of(t), mode, flags & finite);
  if (t == Type::tf32) bits <<= 13;
  if (t == Type::f32 && flags & flush && (bits & 0x7f800000) == 0) bits &= 0x80000000;
  return bits;
}

// data[0]: Flag, data[1]: Rounding, data[2]: target type, data[3]: source type
uint64_t converted(const Instruction& i, uint64_t bits) {
  const Type to = static_cast<Type>(i.data[2]), from = static_cast<Type>(i.data[3]);
  const Rounding mode = static_cast<Rounding>(i.data[1]);
  const uint32_t flags = i.data[0];
  if (from == Type::f32 && mode == Rounding::nearest && flags == 0) {  // most of them
    if (to == Type::f16) return half_of_float(from_bits<float>(bits));
    if (to == Type::bf16) return bf16_of_float(from_bits<float>(bits));
  }
  if (is_integer(from)) {
    const __int128 v = integer_in(bits, from);
    if (is_integer(to)) return integer_out(v, to, flags & saturate);
    return float_out(integer_to_double(v, mode, to != Type::f64), to, mode, flags);
  }
  double x = float_in(bits, from, flags);
  if (is_integer(to)) return float_to_integer(x, from, to, mode);
  if (flags & to_integral) x = integral(x, mode);
  return float_out(x, to, mode, flags);
}

bool execute(Warp& warp, const Instruction& i, uint32_t mask) {
  uint64_t a[kLanes], d[kLanes] = {};
  load(warp, i.operands[1], a);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) d[lane] = converted(i, a[lane]);
  }
  store(warp, i.operands[0], d, mask);
  return true;
}

template <class D, class S>
D widen(S x) {
  return static_cast<D>(x);
}
float bf16_to_float(uint32_t x) {
  const float f = from_bits<float>(x << 16);
  return f != f ? from_bits<float>(0x7fffffff) : f;
}

// Packed: d = {first source in the upper half, second in the lower}.
bool execute_packed(Warp& warp, const Instruction& i, uint32_t mask) {
  uint64_t high[kLanes], low[kLanes];
  uint32_t d[kLanes] = {};
  load(warp, i.operands[1], high);
  load(warp, i.operands[2], low);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) d[lane] = static_cast<uint32_t>(converted(i, high[lane]) << 16 | converted(i, low[lane]));
  }
  store(warp, i.operands[0], d, mask);
  return true;
}

// e4m3x2 and e5m2x2, from two f32 or an f16x2, and back to f16x2.
bool execute_fp8(Warp& warp, const Instruction& i, uint32_t mask) {
  const bool back = i.data[3] == static_cast<uint32_t>(Type::b16);
  const Format& f = i.data[2] ? kE5m2 : kE4m3;
  uint32_t a[kLanes], b[kLanes] = {}, d[kLanes];
  load(warp, i.operands[1], a);
  if (i.operands.size() > 2) load(warp, i.operands[2], b);
  auto narrow = [&](double x) {
    return encode(i.data[0] & relu && x == x && !(x > 0) ? 0.0 : x, f, Rounding::nearest, true);
  };
  for (int lane = 0; lane < kLanes; ++lane) {
    if (back) {
      d[lane] = encode(decode(a[lane] & 0xff, f), kF16, Rounding::nearest) |
                encode(decode(a[lane] >> 8 & 0xff, f), kF16, Rounding::nearest) << 16;
    } else if (i.type == Type::f16x2) {
      d[lane] = narrow(decode(a[lane] & 0xffff, kF16)) | narrow(decode(a[lane] >> 16, kF16)) << 8;
    } else {
      d[lane] = narrow(from_bits<float>(b[lane])) | narrow(from_bits<float>(a[lane])) << 8;
    }
  }
  store(warp, i.operands[0], d, mask);
  return true;
}

bool bind_fp8(Instruction& i) {
  const std::string to = i.modifiers[i.modifiers.size() - 2], from = i.modifiers.back();
  const bool back = to == "f16x2";
  i.data[2] = to == "e5m2x2" || from == "e5m2x2";
  i.data[3] = static_cast<uint32_t>(back ? Type::b16 : Type::f32);
  if (!back && !i.has("satfinite")) unsupported(i);
  return take(i, execute_fp8, back || from == "f16x2" ? 2 : 3,
              {"rn", "satfinite", "relu", "e4m3x2", "e5m2x2", "f16x2", "f32"});
}

}  // namespace

bool bind_convert(Instruction& i) {
  if (i.opcode != "cvt" || i.modifiers.size() < 2) return false;
  const std::string to = i.modifiers[i.modifiers.size() - 2];
  i.data[0] = (i.has("ftz") ? uint32_t(flush) : 0) | (i.has("sat") ? uint32_t(saturate) : 0) |
              (i.has("satfinite") ? uint32_t(finite) : 0) | (i.has("relu") ? uint32_t(relu) : 0) |
              (i.has("rni") || i.has("rzi") || i.has("rmi") || i.has("rpi") ? uint32_t(to_integral) : 0);
  i.data[1] = static_cast<uint32_t>(rounding_of(i));
  const std::initializer_list<const char*> known = {to.c_str(), "rn",  "rz",  "rm",  "rp",  "rna",       "rni",
                                                    "rzi",      "rmi", "rpi", "ftz", "sat", "satfinite", "relu"};
  if (i.has("e4m3x2") || i.has("e5m2x2")) return bind_fp8(i);
  const Type target = type_named(to), source = i.type;
  if (target == Type::f16x2 || target == Type::bf16x2) {
    i.data[2] = static_cast<uint32_t>(target == Type::f16x2 ? Type::f16 : Type::bf16);
    i.data[3] = static_cast<uint32_t>(source);
    return take(i, source == Type::f32 ? execute_packed : nullptr, 3, known);
  }
  auto scalar = [](Type t) {
    return is_integer(t) || t == Type::f16 || t == Type::bf16 || t == Type::f32 || t == Type::f64;
  };
  if (!scalar(source) || (!scalar(target) && target != Type::tf32)) unsupported(i);
  i.data[2] = static_cast<uint32_t>(target);
  i.data[3] = static_cast<uint32_t>(source);
  Execute execute_as = execute;
  if (!(i.data[0] & saturate)) {  // frequent ones without the detour
    if (target == Type::u64 && source == Type::u32) execute_as = apply1<uint64_t, uint32_t, widen<uint64_t, uint32_t>>;
    if (target == Type::s64 && source == Type::s32) execute_as = apply1<int64_t, int32_t, widen<int64_t, int32_t>>;
    if (target == Type::u32 && source == Type::u64) execute_as = apply1<uint32_t, uint64_t, widen<uint32_t, uint64_t>>;
    if (target == Type::f32 && source == Type::bf16 && i.data[0] == 0)
      execute_as = apply1<float, uint32_t, bf16_to_float>;
  }
  return take(i, execute_as, 2, known);
}

}  // namespace hoppersim
