// Integer arithmetic: add, sub, mul, mad, sad, div, rem, abs, neg, min, max, carries, dp4a, dp2a.
#include <algorithm>
#include <type_traits>

#include "core_apply.h"

namespace hoppersim {

bool take(Instruction& i, Execute execute, size_t operands, std::initializer_list<const char*> known) {
  for (const std::string& m : i.modifiers) {
    const bool is_type = i.type != Type::none && &m == &i.modifiers.back();
    if (!is_type && std::none_of(known.begin(), known.end(), [&](const char* k) { return m == k; }))
      unsupported(i, "modifier " + m);
  }
  if (execute == nullptr || i.operands.size() != operands) unsupported(i);
  i.execute = execute;
  return true;
}

namespace {

using i8 = int8_t;
using u8 = uint8_t;
using i16 = int16_t;
using u16 = uint16_t;
using i32 = int32_t;
using u32 = uint32_t;
using i64 = int64_t;
using u64 = uint64_t;
using i128 = __int128;

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
struct WideOf;
template <>
struct WideOf<i16> {
  using type = i32;
};
template <>
struct WideOf<u16> {
  using type = u32;
};
template <>
struct WideOf<i32> {
  using type = i64;
};
template <>
struct WideOf<u32> {
  using type = u64;
};
template <>
struct WideOf<i64> {
  using type = i128;
};
template <>
struct WideOf<u64> {
  using type = unsigned __int128;
};
template <class T>
using Wide = typename WideOf<T>::type;

template <class T>
T add(T a, T b) {
  return static_cast<T>(Unsigned<T>(a) + Unsigned<T>(b));
}
template <class T>
T sub(T a, T b) {
  return static_cast<T>(Unsigned<T>(a) - Unsigned<T>(b));
}
template <class T>
T mul_low(T a, T b) {
  return static_cast<T>(u64(a) * u64(b));
}
template <class T>
T mul_high(T a, T b) {
  return static_cast<T>(Wide<T>(a) * Wide<T>(b) >> 8 * sizeof(T));
}
template <class T>
T mad_low(T a, T b, T c) {
  return static_cast<T>(u64(a) * u64(b) + u64(c));
}
template <class T>
T mad_high(T a, T b, T c) {
  return add<T>(mul_high(a, b), c);
}
template <class T>
Wide<T> mul_wide(T a, T b) {
  return Wide<T>(a) * Wide<T>(b);
}
template <class T>
Wide<T> mad_wide(T a, T b, Wide<T> c) {
  return add<Wide<T>>(Wide<T>(a) * Wide<T>(b), c);
}
template <class T>
T minimum(T a, T b) {
  return std::min(a, b);
}
template <class T>
T maximum(T a, T b) {
  return std::max(a, b);
}
template <class T>
T minimum_relu(T a, T b) {
  return std::max<T>(std::min(a, b), 0);
}
template <class T>
T maximum_relu(T a, T b) {
  return std::max<T>(std::max(a, b), 0);
}
template <class T>
T absolute(T a) {
  return a < 0 ? sub<T>(0, a) : a;
}
template <class T>
T negative(T a) {
  return sub<T>(0, a);
}
template <class T>
T sad(T a, T b, T c) {
  return add<T>(c, a < b ? sub<T>(b, a) : sub<T>(a, b));
}
// The device gives all ones for a division by zero, and the dividend as remainder.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return static_cast<T>(~T(0));
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return negative(a);
  }
  return static_cast<T>(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return 0;
  }
  return static_cast<T>(a % b);
}
i32 add_sat(i32 a, i32 b) { return static_cast<i32>(std::clamp<i64>(i64(a) + b, INT32_MIN, INT32_MAX)); }
i32 sub_sat(i32 a, i32 b) { return static_cast<i32>(std::clamp<i64>(i64(a) - b, INT32_MIN, INT32_MAX)); }
i32 mad_high_sat(i32 a, i32 b, i32 c) { return add_sat(mul_high(a, b), c); }
i32 sign24(i32 a) { return static_cast<i32>(u32(a) << 8) >> 8; }
i32 mul24(i32 a, i32 b) { return static_cast<i32>(i64(sign24(a)) * sign24(b)); }
u32 umul24(u32 a, u32 b) { return (a & 0xffffff) * (b & 0xffffff); }
i32 mad24(i32 a, i32 b, i32 c) { return add(mul24(a, b), c); }
u32 umad24(u32 a, u32 b, u32 c) { return umul24(a, b) + c; }

template <class A, class B>
u32 dot4(u32 a, u32 b, u32 c) {
  for (int k = 0; k < 4; ++k) c += static_cast<u32>(i32(A(a >> 8 * k)) * i32(B(b >> 8 * k)));
  return c;
}
template <class A, class B, int Half>
u32 dot2(u32 a, u32 b, u32 c) {
  for (int k = 0; k < 2; ++k) c += static_cast<u32>(i32(A(a >> 16 * k)) * i32(B(b >> 8 * (k + 2 * Half))));
  return c;
}

// add.cc, addc, sub.cc, subc, mad.lo.cc, madc.hi, …: data[0] bit 0: takes the carry, bit 1: writes it, bit 2: subtracts
template <class T>
bool with_carry(Warp& warp, const Instruction& i, uint32_t mask) {
  T a[kLanes], b[kLanes], d[kLanes];
  load(warp, i.operands[1], a);
  load(warp, i.operands[2], b);
  const bool in = i.data[0] & 1, out = i.data[0] & 2, subtracts = i.data[0] & 4;
  if (i.data[1] != 0) {  // mad: 1 low, 2 high half of the product, then the addend
    const bool is_signed = i.type == Type::s32 || i.type == Type::s64;
    T c[kLanes];
    load(warp, i.operands[3], c);
    for (int lane = 0; lane < kLanes; ++lane) {
      const T high = is_signed ? T(mul_high(std::make_signed_t<T>(a[lane]), std::make_signed_t<T>(b[lane])))
                               : mul_high(a[lane], b[lane]);
      a[lane] = i.data[1] == 2 ? high : T(a[lane] * b[lane]);
      b[lane] = c[lane];
    }
  }
  uint32_t carry = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const T was = in ? warp.carry >> lane & 1 : 0;
    const T x = subtracts ? T(a[lane] - b[lane]) : T(a[lane] + b[lane]);
    const bool first = subtracts ? a[lane] < b[lane] : x < a[lane];
    d[lane] = subtracts ? x - was : x + was;
    const bool second = subtracts ? x < was : d[lane] < x;
    carry |= uint32_t(first || second) << lane;
  }
  if (out) warp.carry = (warp.carry & ~mask) | (carry & mask);
  store(warp, i.operands[0], d, mask);
  return true;
}

template <class T>
Execute arithmetic(const Instruction& i) {
  const std::string& o = i.opcode;
  if (o == "add") return two<T, add<T>>;
  if (o == "sub") return two<T, sub<T>>;
  if (o == "div") return two<T, quotient<T>>;
  if (o == "rem") return two<T, remainder<T>>;
  if (o == "min") return two<T, minimum<T>>;
  if (o == "max") return two<T, maximum<T>>;
  if (o == "sad") return three<T, sad<T>>;
  if (o == "mul" && i.has("lo")) return two<T, mul_low<T>>;
  if (o == "mul" && i.has("hi")) return two<T, mul_high<T>>;
  if (o == "mad" && i.has("lo")) return three<T, mad_low<T>>;
  if (o == "mad" && i.has("hi")) return three<T, mad_high<T>>;
  if constexpr (sizeof(T) < 8) {
    if (o == "mul" && i.has("wide")) return apply2<Wide<T>, T, T, mul_wide<T>>;
    if (o == "mad" && i.has("wide")) return apply3<Wide<T>, T, T, Wide<T>, mad_wide<T>>;
  }
  if constexpr (std::is_signed_v<T>) {
    if (o == "abs") return one<T, absolute<T>>;
    if (o == "neg") return one<T, negative<T>>;
  }
  return nullptr;
}

// Two 16-bit numbers in a register.
template <class T, T (*F)(T, T)>
u32 pair(u32 a, u32 b) {
  return u32(u16(F(T(a), T(b)))) | u32(u16(F(T(a >> 16), T(b >> 16)))) << 16;
}

bool bind_packed(Instruction& i) {
  const bool is_signed = i.modifiers.back() == "s16x2", relu = i.has("relu");
  Execute execute = nullptr;
  if (i.opcode == "add") execute = two<u32, pair<u16, add<u16>>>;
  if (i.opcode == "min") execute = is_signed ? two<u32, pair<i16, minimum<i16>>> : two<u32, pair<u16, minimum<u16>>>;
  if (i.opcode == "max") execute = is_signed ? two<u32, pair<i16, maximum<i16>>> : two<u32, pair<u16, maximum<u16>>>;
  if (relu)
    execute = i.opcode == "min" ? two<u32, pair<i16, minimum_relu<i16>>> : two<u32, pair<i16, maximum_relu<i16>>>;
  return take(i, execute, 3, {"relu", "s16x2", "u16x2"});
}

bool bind_dot(Instruction& i) {
  if (i.modifiers.size() < 2 || (i.opcode == "dp2a" ? i.has("lo") == i.has("hi") : i.has("lo") || i.has("hi")))
    unsupported(i);
  const bool a = i.modifiers[i.modifiers.size() - 2] == "s32", b = i.modifiers.back() == "s32";
  Execute execute;
  if (i.opcode == "dp4a") {
    execute = a ? (b ? three<u32, dot4<i8, i8>> : three<u32, dot4<i8, u8>>)
                : (b ? three<u32, dot4<u8, i8>> : three<u32, dot4<u8, u8>>);
  } else if (i.has("hi")) {
    execute = a ? (b ? three<u32, dot2<i16, i8, 1>> : three<u32, dot2<i16, u8, 1>>)
                : (b ? three<u32, dot2<u16, i8, 1>> : three<u32, dot2<u16, u8, 1>>);
  } else {
    execute = a ? (b ? three<u32, dot2<i16, i8, 0>> : three<u32, dot2<i16, u8, 0>>)
                : (b ? three<u32, dot2<u16, i8, 0>> : three<u32, dot2<u16, u8, 0>>);
  }
  return take(i, execute, 4, {"s32", "u32", "lo", "hi"});
}

bool bind_carry(Instruction& i) {
  const std::string& o = i.opcode;
  i.data[0] = (o == "addc" || o == "subc" || o == "madc" ? 1 : 0) | (i.has("cc") ? 2 : 0) | (o[0] == 's' ? 4 : 0);
  i.data[1] = o[0] != 'm' ? 0 : i.has("hi") ? 2 : 1;
  return take(i, bits_of(i.type) == 64 ? with_carry<u64> : with_carry<u32>, i.data[1] ? 4 : 3, {"cc", "lo", "hi"});
}

}  // namespace

bool bind_integer(Instruction& i) {
  static const char* const mine[] = {"add", "sub", "mul",  "mad",  "sad",  "div",   "rem",   "min",  "max",
                                     "abs", "neg", "addc", "subc", "madc", "mul24", "mad24", "dp4a", "dp2a"};
  if (i.modifiers.empty() ||
      std::none_of(std::begin(mine), std::end(mine), [&](const char* m) { return i.opcode == m; }))
    return false;
  if (i.opcode == "dp4a" || i.opcode == "dp2a") return bind_dot(i);
  if (i.modifiers.back() == "s16x2" || i.modifiers.back() == "u16x2") return bind_packed(i);
  if (i.type >= Type::f16 || i.type == Type::none) return false;
  if (i.has("cc") || i.opcode == "addc" || i.opcode == "subc" || i.opcode == "madc") return bind_carry(i);
  const bool is_signed = i.type == Type::s32;
  if (i.opcode == "mul24") return take(i, is_signed ? two<i32, mul24> : two<u32, umul24>, 3, {"lo"});
  if (i.opcode == "mad24") return take(i, is_signed ? three<i32, mad24> : three<u32, umad24>, 4, {"lo"});
  const size_t operands = i.opcode == "abs" || i.opcode == "neg" ? 2 : i.opcode == "mad" || i.opcode == "sad" ? 4 : 3;
  if (i.has("sat")) {
    const Execute execute = i.opcode == "add"                  ? two<i32, add_sat>
                            : i.opcode == "sub"                ? two<i32, sub_sat>
                            : i.opcode == "mad" && i.has("hi") ? three<i32, mad_high_sat>
                                                               : nullptr;
    return take(i, is_signed ? execute : nullptr, operands, {"sat", "hi"});
  }
  if (i.has("relu"))
    return take(i,
                is_signed ? (i.opcode == "min" ? two<i32, minimum_relu<i32>> : two<i32, maximum_relu<i32>>) : nullptr,
                3, {"relu"});
  Execute execute = nullptr;
  switch (i.type) {
    case Type::s16: execute = arithmetic<i16>(i); break;
    case Type::u16: execute = arithmetic<u16>(i); break;
    case Type::s32: execute = arithmetic<i32>(i); break;
    case Type::u32: execute = arithmetic<u32>(i); break;
    case Type::s64: execute = arithmetic<i64>(i); break;
    case Type::u64: execute = arithmetic<u64>(i); break;
    default: break;
  }
  return take(i, execute, operands, {"lo", "hi", "wide"});
}

}  // namespace hoppersim
