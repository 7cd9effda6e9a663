// Logic, shifts, bit fields, permutation: and, or, xor, not, cnot, lop3, shl, shr, shf, popc, clz, bfind, brev, bfe,
// bfi, bmsk, fns, prmt, szext.
#include <algorithm>
#include <bit>
#include <type_traits>

#include "core_apply.h"

namespace hoppersim {

namespace {

using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

template <class T>
T bit_and(T a, T b) {
  return a & b;
}
template <class T>
T bit_or(T a, T b) {
  return a | b;
}
template <class T>
T bit_xor(T a, T b) {
  return a ^ b;
}
template <class T>
T bit_not(T a) {
  return static_cast<T>(~a);
}
template <class T>
T is_zero(T a) {
  return a == 0;
}
// Shift counts beyond the width are clamped to it.
template <class T>
T shift_left(T a, u32 b) {
  return b >= 8 * sizeof(T) ? T(0) : static_cast<T>(a << b);
}
template <class T>
T shift_right(T a, u32 b) {
  constexpr u32 bits = 8 * sizeof(T);
  if constexpr (std::is_signed_v<T>) return static_cast<T>(a >> std::min(b, bits - 1));
  return b >= bits ? T(0) : static_cast<T>(a >> b);
}
u32 funnel_left_clamp(u32 low, u32 high, u32 n) {
  return static_cast<u32>((u64(high) << 32 | low) << std::min(n, 32u) >> 32);
}
u32 funnel_left_wrap(u32 low, u32 high, u32 n) { return static_cast<u32>((u64(high) << 32 | low) << (n & 31) >> 32); }
u32 funnel_right_clamp(u32 low, u32 high, u32 n) {
  return static_cast<u32>((u64(high) << 32 | low) >> std::min(n, 32u));
}
u32 funnel_right_wrap(u32 low, u32 high, u32 n) { return static_cast<u32>((u64(high) << 32 | low) >> (n & 31)); }
template <class T>
u32 population(T a) {
  return static_cast<u32>(std::popcount(a));
}
template <class T>
u32 leading_zeros(T a) {
  return static_cast<u32>(std::countl_zero(a));
}
template <class T>
T reversed(T a) {
  T r = 0;
  for (size_t k = 0; k < 8 * sizeof(T); ++k) r = static_cast<T>(r << 1 | (a >> k & 1));
  return r;
}
template <class T, bool Amount>
u32 find_bit(T a) {
  using U = std::make_unsigned_t<T>;
  U bits = static_cast<U>(a);
  if (std::is_signed_v<T> && a < 0) bits = static_cast<U>(~bits);
  if (bits == 0) return kAll;
  const u32 zeros = static_cast<u32>(std::countl_zero(bits));
  return Amount ? zeros : static_cast<u32>(8 * sizeof(T)) - 1 - zeros;
}
template <class T>
T field(T a, u32 b, u32 c) {  // bfe
  constexpr u32 bits = 8 * sizeof(T);
  const u32 position = b & 0xff, length = c & 0xff;
  using U = std::make_unsigned_t<T>;
  U result = 0;
  const U source = static_cast<U>(a);
  const U sign = !std::is_signed_v<T> || length == 0 ? 0 : source >> std::min(position + length - 1, bits - 1) & 1;
  for (u32 k = 0; k < bits; ++k) {
    const U bit = k < length && position + k < bits ? source >> (position + k) & 1 : sign;
    result |= bit << k;
  }
  return static_cast<T>(result);
}
template <class T>
bool insert_field(Warp& warp, const Instruction& i, uint32_t mask) {  // bfi f, a, b, position, length
  T a[kLanes], b[kLanes], d[kLanes];
  u32 position[kLanes], length[kLanes];
  load(warp, i.operands[1], a);
  load(warp, i.operands[2], b);
  load(warp, i.operands[3], position);
  load(warp, i.operands[4], length);
  constexpr u32 bits = 8 * sizeof(T);
  for (int lane = 0; lane < kLanes; ++lane) {
    const u32 p = position[lane] & 0xff, n = length[lane] & 0xff;
    const T ones = n >= bits ? T(~T(0)) : static_cast<T>((T(1) << n) - 1);
    const T place = p >= bits ? T(0) : static_cast<T>(ones << p);
    d[lane] = p >= bits ? b[lane] : static_cast<T>((b[lane] & ~place) | (a[lane] << p & place));
  }
  store(warp, i.operands[0], d, mask);
  return true;
}
template <bool Wrap>
u32 bit_mask(u32 a, u32 b) {
  const u32 p = Wrap ? a & 31 : std::min(a, 32u), n = Wrap ? b & 31 : std::min(b, 32u);
  return static_cast<u32>(((1ull << n) - 1) << p);
}
template <class T, bool Wrap>
T extend_sign(T a, u32 b) {
  const u32 n = Wrap ? b & 31 : std::min(b, 32u);
  if (n == 0) return 0;
  return static_cast<T>(T(u32(a) << (32 - n)) >> (32 - n));
}
u32 find_nth(u32 mask, u32 base, int32_t offset) {
  if (base > 31) return kAll;
  if (offset == 0) return mask >> base & 1 ? base : kAll;
  const int step = offset > 0 ? 1 : -1;
  int left = std::abs(offset);
  for (int at = static_cast<int>(base); at >= 0 && at < 32; at += step) {
    if ((mask >> at & 1) && --left == 0) return static_cast<u32>(at);
  }
  return kAll;
}

u32 permute(u32 a, u32 b, u32 selector) {
  const u64 bytes = u64(b) << 32 | a;
  u32 result = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 s = selector >> 4 * k & 0xf;
    u32 byte = static_cast<u32>(bytes >> 8 * (s & 7)) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * k;
  }
  return result;
}
// The special modes choose the four bytes by the low two bits of the selector.
template <int Mode>
u32 permute_mode(u32 a, u32 b, u32 selector) {
  static constexpr u32 table[6][4] = {{0x3210, 0x4321, 0x5432, 0x6543},   // f4e
                                      {0x5670, 0x6701, 0x7012, 0x0123},   // b4e
                                      {0x0000, 0x1111, 0x2222, 0x3333},   // rc8
                                      {0x3210, 0x3211, 0x3222, 0x3333},   // ecl
                                      {0x0000, 0x1110, 0x2210, 0x3210},   // ecr
                                      {0x1010, 0x3232, 0x1010, 0x3232}};  // rc16
  return permute(a, b, table[Mode][selector & 3]);
}

bool logic3(Warp& warp, const Instruction& i, uint32_t mask) {
  u32 a[kLanes], b[kLanes], c[kLanes], d[kLanes];
  load(warp, i.operands[1], a);
  load(warp, i.operands[2], b);
  load(warp, i.operands[3], c);
  std::fill(d, d + kLanes, 0);
  for (int term = 0; term < 8; ++term) {
    if (!(i.data[0] >> term & 1)) continue;
    const u32 fa = term & 4 ? 0 : kAll, fb = term & 2 ? 0 : kAll, fc = term & 1 ? 0 : kAll;
    for (int lane = 0; lane < kLanes; ++lane) d[lane] |= (a[lane] ^ fa) & (b[lane] ^ fb) & (c[lane] ^ fc);
  }
  store(warp, i.operands[0], d, mask);
  return true;
}

// and.pred and the like: data[0]: 0 and, 1 or, 2 xor, 3 not
bool logic_predicate(Warp& warp, const Instruction& i, uint32_t mask) {
  const u32 a = predicate_mask(warp, i.operands[1]);
  const u32 b = i.data[0] == 3 ? 0 : predicate_mask(warp, i.operands[2]);
  const u32 result = i.data[0] == 0 ? a & b : i.data[0] == 1 ? a | b : i.data[0] == 2 ? a ^ b : ~a;
  u32& target = warp.predicates[i.operands[0].index];
  target = (target & ~mask) | (result & mask);
  return true;
}

template <class T>
Execute logic(const std::string& o) {
  if (o == "and") return two<T, bit_and<T>>;
  if (o == "or") return two<T, bit_or<T>>;
  if (o == "xor") return two<T, bit_xor<T>>;
  if (o == "not") return one<T, bit_not<T>>;
  if (o == "cnot") return one<T, is_zero<T>>;
  if (o == "shl") return apply2<T, T, u32, shift_left<T>>;
  return nullptr;
}

Execute shift_right_of(Type type) {
  switch (type) {
    case Type::s16: return apply2<int16_t, int16_t, u32, shift_right<int16_t>>;
    case Type::s32: return apply2<int32_t, int32_t, u32, shift_right<int32_t>>;
    case Type::s64: return apply2<int64_t, int64_t, u32, shift_right<int64_t>>;
    case Type::u16:
    case Type::b16: return apply2<u16, u16, u32, shift_right<u16>>;
    case Type::u32:
    case Type::b32: return apply2<u32, u32, u32, shift_right<u32>>;
    case Type::u64:
    case Type::b64: return apply2<u64, u64, u32, shift_right<u64>>;
    default: return nullptr;
  }
}

template <bool Amount>
Execute find_bit_of(Type type) {
  switch (type) {
    case Type::u32:
    case Type::b32: return apply1<u32, u32, find_bit<u32, Amount>>;
    case Type::s32: return apply1<u32, int32_t, find_bit<int32_t, Amount>>;
    case Type::u64:
    case Type::b64: return apply1<u32, u64, find_bit<u64, Amount>>;
    case Type::s64: return apply1<u32, int64_t, find_bit<int64_t, Amount>>;
    default: return nullptr;
  }
}

Execute field_of(Type type) {
  switch (type) {
    case Type::u32: return apply3<u32, u32, u32, u32, field<u32>>;
    case Type::s32: return apply3<int32_t, int32_t, u32, u32, field<int32_t>>;
    case Type::u64: return apply3<u64, u64, u32, u32, field<u64>>;
    case Type::s64: return apply3<int64_t, int64_t, u32, u32, field<int64_t>>;
    default: return nullptr;
  }
}

bool bind_logic(Instruction& i) {
  const std::string& o = i.opcode;
  const size_t operands = o == "not" || o == "cnot" ? 2 : 3;
  if (i.type == Type::pred) {
    i.data[0] = o == "and" ? 0 : o == "or" ? 1 : o == "xor" ? 2 : 3;
    return take(i, o == "cnot" || o == "shl" ? nullptr : logic_predicate, operands);
  }
  const int bits = bits_of(i.type);
  return take(i, bits == 16 ? logic<u16>(o) : bits == 32 ? logic<u32>(o) : logic<u64>(o), operands);
}

bool bind_permute(Instruction& i) {
  static constexpr Execute modes[] = {three<u32, permute_mode<0>>, three<u32, permute_mode<1>>,
                                      three<u32, permute_mode<2>>, three<u32, permute_mode<3>>,
                                      three<u32, permute_mode<4>>, three<u32, permute_mode<5>>};
  static const char* const names[] = {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
  for (int k = 0; k < 6; ++k) {
    if (!i.modifiers.empty() && i.modifiers.back() == names[k]) return take(i, modes[k], 4, {"b32", names[k]});
  }
  return take(i, three<u32, permute>, 4);
}

bool bind_funnel(Instruction& i) {
  const bool wrap = i.has("wrap");
  const Execute left = wrap ? three<u32, funnel_left_wrap> : three<u32, funnel_left_clamp>;
  const Execute right = wrap ? three<u32, funnel_right_wrap> : three<u32, funnel_right_clamp>;
  return take(i, i.has("l") ? left : right, 4, {"l", "r", "wrap", "clamp"});
}

}  // namespace

bool bind_bits(Instruction& i) {
  const std::string& o = i.opcode;
  const bool wide = bits_of(i.type) == 64;
  if (o == "and" || o == "or" || o == "xor" || o == "not" || o == "cnot" || o == "shl") return bind_logic(i);
  if (o == "lop3") {
    if (i.operands.size() != 5) unsupported(i);
    i.data[0] = static_cast<u32>(i.operands[4].immediate);
    return take(i, logic3, 5);
  }
  if (o == "shr") return take(i, shift_right_of(i.type), 3);
  if (o == "shf") return bind_funnel(i);
  if (o == "popc") return take(i, wide ? apply1<u32, u64, population<u64>> : apply1<u32, u32, population<u32>>, 2);
  if (o == "clz") return take(i, wide ? apply1<u32, u64, leading_zeros<u64>> : apply1<u32, u32, leading_zeros<u32>>, 2);
  if (o == "brev") return take(i, wide ? one<u64, reversed<u64>> : one<u32, reversed<u32>>, 2);
  if (o == "bfind")
    return take(i, i.has("shiftamt") ? find_bit_of<true>(i.type) : find_bit_of<false>(i.type), 2, {"shiftamt"});
  if (o == "bfe") return take(i, field_of(i.type), 4);
  if (o == "bfi") return take(i, wide ? insert_field<u64> : insert_field<u32>, 5);
  if (o == "bmsk")
    return take(i, i.has("wrap") ? two<u32, bit_mask<true>> : two<u32, bit_mask<false>>, 3, {"wrap", "clamp"});
  if (o == "fns") return take(i, apply3<u32, u32, u32, int32_t, find_nth>, 4);
  if (o == "prmt") return bind_permute(i);
  if (o == "szext") {
    const bool wrap = i.has("wrap");
    const Execute u = wrap ? two<u32, extend_sign<u32, true>> : two<u32, extend_sign<u32, false>>;
    const Execute s = wrap ? apply2<int32_t, int32_t, u32, extend_sign<int32_t, true>>
                           : apply2<int32_t, int32_t, u32, extend_sign<int32_t, false>>;
    return take(i, i.type == Type::s32 ? s : u, 3, {"wrap", "clamp"});
  }
  return false;
}

}  // namespace hoppersim
