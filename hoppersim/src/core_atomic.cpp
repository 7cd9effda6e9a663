// atom and red on global and shared memory.
#include <algorithm>
#include <mutex>

#include "core.h"
#include "core_formats.h"
#include "races.h"
#include "races_global.h"

namespace hoppersim {

namespace {

enum Op : uint32_t { add_, inc_, dec_, min_, max_, and_, or_, xor_, exch_, cas_, count_ };
constexpr const char* kNames[] = {"add", "inc", "dec", "min", "max", "and", "or", "xor", "exch", "cas"};

std::mutex global_mutex;  // clusters on other host threads

uint32_t half_add(uint32_t a, uint32_t b, const Format& f) {
  return encode(fma_to_odd(decode(a & 0xffff, f), 1, decode(b & 0xffff, f)), f, Rounding::nearest);
}
uint32_t half_pick(uint32_t op, uint32_t a, uint32_t b, const Format& f) {
  const double x = decode(a & 0xffff, f), y = decode(b & 0xffff, f);
  if (x != x || y != y) return x != x ? b & 0xffff : a & 0xffff;
  return ((x < y) == (op == min_) ? a : b) & 0xffff;
}

uint64_t floating(uint32_t op, Type type, uint64_t a, uint64_t b) {
  switch (type) {
    case Type::f32: return to_bits(from_bits<float>(a) + from_bits<float>(b));
    case Type::f64: return to_bits(from_bits<double>(a) + from_bits<double>(b));
    default: break;
  }
  const Format& f = type == Type::f16 || type == Type::f16x2 ? kF16 : kBf16;
  auto one = [&](uint64_t x, uint64_t y) {
    return op == add_ ? half_add(uint32_t(x), uint32_t(y), f) : half_pick(op, uint32_t(x), uint32_t(y), f);
  };
  if (type == Type::f16 || type == Type::bf16) return one(a, b);
  return one(a, b) | uint64_t(one(a >> 16, b >> 16)) << 16;
}

uint64_t result_of(uint32_t op, Type type, uint64_t a, uint64_t b, uint64_t c) {
  if (op == exch_) return b;
  if (op == cas_) return a == b ? c : a;
  if (type >= Type::f16) return floating(op, type, a, b);
  const bool is_signed = type == Type::s32 || type == Type::s64;
  const bool less = bits_of(type) == 32 ? (is_signed ? int32_t(a) < int32_t(b) : uint32_t(a) < uint32_t(b))
                    : is_signed         ? int64_t(a) < int64_t(b)
                                        : a < b;
  switch (op) {
    case add_: return a + b;
    case inc_: return a >= b ? 0 : a + 1;
    case dec_: return a == 0 || a > b ? b : a - 1;
    case min_: return less ? a : b;
    case max_: return less ? b : a;
    case and_: return a & b;
    case or_: return a | b;
    default: return a ^ b;
  }
}

void count(Warp& warp, const uint64_t* addresses, uint32_t mask, int bytes, bool shared) {
  Counters& counters = warp.cta->cluster->counters;
  if (!shared) {
    count_global(counters, addresses, mask, bytes, true);
    return;
  }
  uint32_t offsets[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) offsets[lane] = static_cast<uint32_t>(addresses[lane] % kRankStride);
  }
  count_shared(counters, offsets, mask, bytes);
}

const Operand& element(const Operand& operand, size_t k) {
  return operand.kind == Operand::Kind::vector ? operand.elements[k] : operand;
}

// data[0]: Op, data[1]: Space, data[2]: index of the address operand (1: atom, 0: red), data[3]: elements
bool execute(Warp& warp, const Instruction& i, uint32_t mask) {
  const Space space = static_cast<Space>(i.data[1]);
  const uint32_t at = i.data[2];
  const size_t size = static_cast<size_t>(bits_of(i.type) / 8);
  uint64_t addresses[kLanes] = {};
  const bool shared = space == Space::shared;
  std::unique_lock lock(global_mutex, std::defer_lock);
  if (!shared) lock.lock();
  uint64_t places[kLanes] = {};
  bool in_shared = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) in_shared |= normalise(space, places[lane] = address_of(warp, i.operands[at], lane));
  }
  acquire_addresses(warp, i, places, mask, in_shared);
  if (!in_shared) release_global(warp, space, places, mask);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    addresses[lane] = address_of(warp, i.operands[at], lane);
    for (uint32_t k = 0; k < i.data[3]; ++k) {
      uint64_t old = 0;
      const uint64_t address = addresses[lane] + k * size,
                     b = operand_value(warp, element(i.operands[at + 1], k), lane);
      const uint64_t c = i.data[0] == cas_ ? operand_value(warp, i.operands[at + 2], lane) : 0;
      read_memory(warp, i, space, address, size, &old, lane);
      const uint64_t now = result_of(i.data[0], i.type, old, b, c);
      write_memory(warp, i, space, address, size, &now, lane);
      if (at == 1) set_register(warp, element(i.operands[0], k), lane, old);
    }
  }
  if (in_shared) note_writes(warp, i, space, addresses, mask, size * i.data[3]);
  note_global_writes(warp, i, space, addresses, mask, size * i.data[3]);
  release_addresses(warp, i, places, mask, in_shared);
  if (!in_shared) acquire_global(warp, space, places, mask);
  const uint64_t first = addresses[__builtin_ctz(mask)];
  count(warp, addresses, mask, static_cast<int>(size * i.data[3]),
        shared || (first >= kSharedWindow && first < kLocalWindow));
  return true;
}

bool supported(uint32_t op, Type type) {
  switch (type) {
    case Type::u32:
    case Type::s32:
    case Type::b32:
    case Type::u64:
    case Type::s64:
    case Type::b64: return true;
    case Type::b16: return op == cas_ || op == exch_;
    case Type::f32:
    case Type::f64: return op == add_;
    case Type::f16:
    case Type::bf16:
    case Type::f16x2:
    case Type::bf16x2: return op == add_ || op == min_ || op == max_;
    default: return false;
  }
}

}  // namespace

bool bind_atomic(Instruction& i) {
  if ((i.opcode != "atom" && i.opcode != "red") || i.has("async")) return false;
  static const char* const known[] = {"relaxed", "acquire", "release", "acq_rel", "cta",         "cluster",
                                      "gpu",     "sys",     "global",  "shared",  "shared::cta", "shared::cluster",
                                      "noftz",   "v2",      "v4",      "v8"};
  i.data[0] = count_;
  for (size_t m = 0; m + 1 < i.modifiers.size(); ++m) {
    for (uint32_t k = 0; k < count_; ++k) {
      if (i.modifiers[m] == kNames[k]) i.data[0] = k;
    }
    const bool op = i.data[0] != count_ && i.modifiers[m] == kNames[i.data[0]];
    if (!op && std::none_of(std::begin(known), std::end(known), [&](const char* k) { return i.modifiers[m] == k; }))
      unsupported(i, "modifier " + i.modifiers[m]);
  }
  if (i.data[0] == count_ || !supported(i.data[0], i.type)) unsupported(i);
  i.data[1] =
      static_cast<uint32_t>(i.has("global")                                                       ? Space::global
                            : i.has("shared") || i.has("shared::cta") || i.has("shared::cluster") ? Space::shared
                                                                                                  : Space::generic);
  i.data[2] = i.opcode == "atom" ? 1 : 0;
  i.data[3] = i.has("v2") ? 2 : i.has("v4") ? 4 : i.has("v8") ? 8 : 1;
  if (i.operands.size() != i.data[2] + (i.data[0] == cas_ ? 3 : 2)) unsupported(i);
  i.execute = execute;
  return true;
}

}  // namespace hoppersim
