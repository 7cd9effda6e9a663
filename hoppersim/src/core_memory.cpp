// ld and st of every state space, vector width and type; prefetch and other hints.
#include "core.h"
#include "races.h"
#include "races_global.h"
#include "report.h"

namespace hoppersim {

namespace {

enum Field { kSpace, kElements, kBytes, kFlags };  // Instruction::data
enum Flag : uint32_t { own_cta = 1, sign_extend = 2 };

Space space_of_operand(const Instruction& i, const Operand& address) {
  if (i.has("global")) return Space::global;
  if (i.has("shared") || i.has("shared::cta") || i.has("shared::cluster")) return Space::shared;
  if (i.has("local")) return Space::local;
  if (i.has("const")) return Space::global;
  if (i.has("param") || i.has("param::entry") || i.has("param::func"))
    return address.space == Space::local ? Space::local : Space::param;
  return Space::generic;
}

// Sectors and wavefronts of one warp access, by where the lanes' addresses lead.
void count(Warp& warp, const Instruction& i, const uint64_t* addresses, uint32_t mask, int bytes, bool write) {
  uint32_t shared_mask = 0, global_mask = 0, offsets[kLanes];
  const Space space = static_cast<Space>(i.data[kSpace]);
  if (space == Space::local || space == Space::param) return;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint64_t a = addresses[lane];
    if (space == Space::shared || (space == Space::generic && a >= kSharedWindow && a < kLocalWindow)) {
      offsets[lane] = static_cast<uint32_t>(a % kRankStride);
      shared_mask |= 1u << lane;
    } else if (space == Space::global || a < kSharedWindow) {
      global_mask |= 1u << lane;
    }
  }
  Counters& counters = warp.cta->cluster->counters;
  if (shared_mask) count_shared(counters, offsets, shared_mask, bytes);
  if (global_mask) count_global(counters, addresses, global_mask, bytes, write);
}

void check_own(Warp& warp, const Instruction& i, uint64_t address, int lane) {
  if (address / kRankStride != static_cast<uint64_t>(warp.cta->rank)) {
    fault("out-of-bounds shared", warp, i,
          "address " + std::to_string(address) + " belongs to another CTA; only shared::cluster reaches it", lane);
  }
}

const Operand& element(const Operand& operand, size_t k) {
  return operand.kind == Operand::Kind::vector ? operand.elements[k] : operand;
}

// What a lane reads or writes, up to 64 bytes.
using LaneBytes = uint8_t[kLanes][64];

template <class Bits>
void put(Warp& warp, const Operand& target, uint32_t mask, const LaneBytes& bytes, int offset) {
  uint64_t values[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    Bits value = 0;
    if (mask >> lane & 1) std::memcpy(&value, bytes[lane] + offset, sizeof(Bits));
    values[lane] = static_cast<uint64_t>(static_cast<int64_t>(value));  // extends a signed one
  }
  store(warp, target, values, mask);
}

void put(Warp& warp, const Operand& target, uint32_t mask, const LaneBytes& bytes, int offset, int size, bool sign) {
  switch (size) {
    case 1:
      return sign ? put<int8_t>(warp, target, mask, bytes, offset) : put<uint8_t>(warp, target, mask, bytes, offset);
    case 2:
      return sign ? put<int16_t>(warp, target, mask, bytes, offset) : put<uint16_t>(warp, target, mask, bytes, offset);
    case 4:
      return sign ? put<int32_t>(warp, target, mask, bytes, offset) : put<uint32_t>(warp, target, mask, bytes, offset);
    case 8: return put<uint64_t>(warp, target, mask, bytes, offset);
    default: break;
  }
  if (target.kind != Operand::Kind::reg) return;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1) std::memcpy(&warp.registers[size_t(target.index) * kLanes + 4 * lane], bytes[lane], 16);
  }
}

void get(const Warp& warp, const Operand& source, LaneBytes& bytes, int offset, int size) {
  if (size == 16) {
    for (int lane = 0; lane < kLanes; ++lane)
      std::memcpy(bytes[lane], &warp.registers[size_t(source.index) * kLanes + 4 * lane], 16);
    return;
  }
  uint64_t values[kLanes];
  load(warp, source, values);
  for (int lane = 0; lane < kLanes; ++lane) std::memcpy(bytes[lane] + offset, &values[lane], size);
}

// A strong access acquires from, or releases to, its addresses.
void at_addresses(Warp& warp, const Instruction& i, Space space, const uint64_t* addresses, uint32_t mask,
                  void (*effect)(Warp&, const Instruction&, const uint64_t*, uint32_t, bool)) {
  uint64_t plain[kLanes];
  uint32_t shared = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    plain[lane] = addresses[lane];
    if (mask >> lane & 1 && normalise(space, plain[lane])) shared |= 1u << lane;
  }
  if (shared) effect(warp, i, plain, shared, true);
  if (mask & ~shared) effect(warp, i, plain, mask & ~shared, false);
}

bool execute_load(Warp& warp, const Instruction& i, uint32_t mask) {
  const int elements = static_cast<int>(i.data[kElements]), size = static_cast<int>(i.data[kBytes]);
  const Space space = static_cast<Space>(i.data[kSpace]);
  uint64_t addresses[kLanes];
  LaneBytes bytes;
  addresses_of(warp, i.operands[1], addresses);
  if (i.strong) at_addresses(warp, i, space, addresses, mask, acquire_addresses);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (i.data[kFlags] & own_cta) check_own(warp, i, addresses[lane], lane);
    read_memory(warp, i, space, addresses[lane], size_t(size) * elements, bytes[lane], lane);
  }
  if (space == Space::shared || space == Space::generic)
    note_reads(warp, i, space, addresses, mask, size_t(size) * elements);
  if (i.strong) acquire_global(warp, space, addresses, mask);
  note_global(warp, i, space, addresses, mask, size_t(size) * elements, false);
  for (int k = 0; k < elements; ++k)
    put(warp, element(i.operands[0], k), mask, bytes, k * size, size, i.data[kFlags] & sign_extend);
  count(warp, i, addresses, mask, size * elements, false);
  return true;
}

// Stores of lanes that are neighbours, or at the same place, and what they mean for races.
void store_run(Warp& warp, const Instruction& i, const Run& run, const uint64_t* addresses, const LaneBytes& bytes,
               size_t size) {
  const Space space = static_cast<Space>(i.data[kSpace]);
  uint8_t before[64];
  const bool inside = run.cta != nullptr && run.offset + run.size <= run.cta->shared.bytes.size();
  if (inside) std::memcpy(before, &run.cta->shared.bytes[run.offset], run.size);
  const uint8_t* first = bytes[__builtin_ctz(run.lanes)];
  for (uint32_t left = run.lanes; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    write_memory(warp, i, space, addresses[lane], size, bytes[lane], lane);
    if (inside && run.share == 0 && !i.strong && std::memcmp(first, bytes[lane], size) != 0)
      report("race within a warp", warp, i,
             "lanes " + std::to_string(__builtin_ctz(run.lanes)) + " and " + std::to_string(lane) +
                 " of this instruction write different values to the same shared address",
             lane);
  }
  if (inside) note_write(warp, i, run, before);
}

bool execute_store(Warp& warp, const Instruction& i, uint32_t mask) {
  const int elements = static_cast<int>(i.data[kElements]), size = static_cast<int>(i.data[kBytes]);
  const Space space = static_cast<Space>(i.data[kSpace]);
  uint64_t addresses[kLanes];
  LaneBytes bytes;
  addresses_of(warp, i.operands[0], addresses);
  for (int k = 0; k < elements; ++k) get(warp, element(i.operands[1], k), bytes, k * size, size);
  const size_t width = size_t(size) * elements;
  if (i.data[kFlags] & own_cta) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1) check_own(warp, i, addresses[lane], lane);
    }
  }
  if (i.strong || !warp.fenced.empty()) release_global(warp, space, addresses, mask);
  warp.changed = 0;
  for (uint32_t left = mask; left;) {
    const Run run = first_run(warp, space, addresses, left, width);
    store_run(warp, i, run, addresses, bytes, width);
    left &= ~run.lanes;
  }
  note_global_writes(warp, i, space, addresses, mask, width);
  note_global(warp, i, space, addresses, mask & warp.changed, width, true);
  if (i.strong) at_addresses(warp, i, space, addresses, mask, release_addresses);
  count(warp, i, addresses, mask, size * elements, true);
  return true;
}

bool nothing(Warp&, const Instruction&, uint32_t) { return true; }

bool known_modifier(const std::string& m) {
  static const char* const known[] = {"global",
                                      "shared",
                                      "shared::cta",
                                      "shared::cluster",
                                      "local",
                                      "param",
                                      "param::entry",
                                      "param::func",
                                      "const",
                                      "nc",
                                      "weak",
                                      "volatile",
                                      "relaxed",
                                      "acquire",
                                      "release",
                                      "cta",
                                      "cluster",
                                      "gpu",
                                      "sys",
                                      "ca",
                                      "cg",
                                      "cs",
                                      "lu",
                                      "cv",
                                      "wb",
                                      "wt",
                                      "mmio",
                                      "v2",
                                      "v4",
                                      "v8",
                                      "unified",
                                      "L1::evict_normal",
                                      "L1::evict_unchanged",
                                      "L1::evict_first",
                                      "L1::evict_last",
                                      "L1::no_allocate",
                                      "L2::cache_hint",
                                      "L2::64B",
                                      "L2::128B",
                                      "L2::256B",
                                      "L2::evict_first",
                                      "L2::evict_last",
                                      "L2::evict_normal"};
  for (const char* name : known) {
    if (m == name) return true;
  }
  return false;
}

bool bind_hint(Instruction& i) {
  if (i.opcode != "prefetch" && i.opcode != "prefetchu" && i.opcode != "discard" && i.opcode != "applypriority" &&
      i.opcode != "createpolicy")
    return false;
  if (i.opcode == "discard") unsupported(i);
  i.execute = nothing;
  if (i.opcode == "createpolicy") {  // a policy is a number that nothing reads
    i.execute = [](Warp& warp, const Instruction& in, uint32_t mask) {
      const uint64_t zero[kLanes] = {};
      store(warp, in.operands[0], zero, mask);
      return true;
    };
  }
  return true;
}

}  // namespace

bool bind_memory(Instruction& i) {
  if (bind_hint(i)) return true;
  if ((i.opcode != "ld" && i.opcode != "ldu" && i.opcode != "st") || i.has("async") || i.has("bulk")) return false;
  const bool is_load = i.opcode != "st";
  for (size_t k = 0; k + 1 < i.modifiers.size(); ++k) {
    if (!known_modifier(i.modifiers[k])) unsupported(i, "modifier " + i.modifiers[k]);
  }
  const bool hint = i.has("L2::cache_hint");
  if (i.operands.size() != size_t(hint ? 3 : 2) || i.type == Type::none || i.type == Type::pred) unsupported(i);
  const Operand& data = i.operands[is_load ? 0 : 1];
  const Operand& address = i.operands[is_load ? 1 : 0];
  const size_t wanted = i.has("v2") ? 2 : i.has("v4") ? 4 : i.has("v8") ? 8 : 1;
  if ((data.kind == Operand::Kind::vector ? data.elements.size() : 1) != wanted ||
      address.kind != Operand::Kind::address)
    unsupported(i);
  i.data[kSpace] = static_cast<uint32_t>(space_of_operand(i, address));
  i.data[kElements] = static_cast<uint32_t>(wanted);
  i.data[kBytes] = static_cast<uint32_t>(bits_of(i.type) / 8);
  const bool sign = i.type == Type::s8 || i.type == Type::s16 || i.type == Type::s32 || i.type == Type::s64;
  i.data[kFlags] =
      (sign ? uint32_t(sign_extend) : 0) | (i.has("shared") || i.has("shared::cta") ? uint32_t(own_cta) : 0);
  if (wanted * i.data[kBytes] > 32) unsupported(i);
  i.execute = is_load ? execute_load : execute_store;
  return true;
}

}  // namespace hoppersim
