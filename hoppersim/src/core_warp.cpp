// Within a warp: shfl, vote, match, redux, activemask, elect, bar.warp.sync. They wait until all members are at the
// instruction.
#include <algorithm>
#include <bit>

#include "core.h"
#include "order.h"

namespace hoppersim {

namespace {

enum Shuffle : uint32_t { up_, down_, bfly_, idx_ };
enum Vote : uint32_t { all_, any_, uni_, ballot_ };
enum Reduce : uint32_t { add_, min_, max_, and_, or_, xor_ };
constexpr uint32_t kPoison = 0xdeadbeef;  // what a shuffle reads from a lane that takes no part

// The member mask, if all its lanes are here; 0: not yet.
uint32_t members_here(Warp& warp, const Instruction& i, const Operand& operand, uint32_t mask) {
  const uint32_t members = static_cast<uint32_t>(operand_value(warp, operand, std::countr_zero(mask)));
  if (members == 0) fault("member mask", warp, i, "is empty");
  if (!converged(warp, i, members, warp.current->mask)) return 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint32_t own = static_cast<uint32_t>(operand_value(warp, operand, lane));
    if (!(own >> lane & 1)) fault("member mask", warp, i, "the lane is not in its own mask", lane);
    if (own != members) fault("member mask", warp, i, "differs between lanes", lane);
  }
  if (members & warp.alive & ~mask) fault("member mask", warp, i, "names lanes whose guard is false");
  share(warp, members);
  return members;
}

void put_predicate(Warp& warp, const Operand& target, uint32_t result, uint32_t mask) {
  if (target.kind != Operand::Kind::predicate) return;
  uint32_t& bits = warp.predicates[target.index];
  bits = (bits & ~mask) | (result & mask);
}

bool shuffle(Warp& warp, const Instruction& i, uint32_t mask) {
  if (!members_here(warp, i, i.operands[4], mask)) return false;
  uint32_t a[kLanes], b[kLanes], c[kLanes], d[kLanes], inside = 0;
  load(warp, i.operands[1], a);
  load(warp, i.operands[2], b);
  load(warp, i.operands[3], c);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int by = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int j = i.data[0] == up_     ? lane - by
            : i.data[0] == down_ ? lane + by
            : i.data[0] == bfly_ ? lane ^ by
                                 : first | (by & ~segment);
    const bool in = i.data[0] == up_ ? j >= last : j <= last;
    if (!in) j = lane;
    inside |= uint32_t(in) << lane;
    d[lane] = mask >> j & 1 ? a[j] : kPoison;
  }
  store(warp, i.operands[0], d, mask);
  if (!i.operands[0].elements.empty()) put_predicate(warp, i.operands[0].elements[0], inside, mask);
  return true;
}

bool vote(Warp& warp, const Instruction& i, uint32_t mask) {
  if (!members_here(warp, i, i.operands[2], mask)) return false;
  const uint32_t holds = predicate_mask(warp, i.operands[1]) & mask;
  if (i.data[0] == ballot_) {
    uint32_t d[kLanes];
    std::fill(d, d + kLanes, holds);
    store(warp, i.operands[0], d, mask);
    return true;
  }
  const bool result = i.data[0] == all_ ? holds == mask : i.data[0] == any_ ? holds != 0 : holds == mask || holds == 0;
  put_predicate(warp, i.operands[0], result ? kAll : 0, mask);
  return true;
}

bool match(Warp& warp, const Instruction& i, uint32_t mask) {
  if (!members_here(warp, i, i.operands[2], mask)) return false;
  uint64_t a[kLanes];
  uint32_t d[kLanes] = {};
  load(warp, i.operands[1], a);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int other = 0; other < kLanes; ++other)
      d[lane] |= uint32_t((mask >> other & 1) && a[other] == a[lane]) << other;
  }
  if (i.data[0] == all_) {
    const bool same = d[std::countr_zero(mask)] == mask;
    std::fill(d, d + kLanes, same ? mask : 0);
    if (!i.operands[0].elements.empty()) put_predicate(warp, i.operands[0].elements[0], same ? kAll : 0, mask);
  }
  store(warp, i.operands[0], d, mask);
  return true;
}

bool reduce(Warp& warp, const Instruction& i, uint32_t mask) {
  if (!members_here(warp, i, i.operands[2], mask)) return false;
  uint32_t a[kLanes], d[kLanes];
  load(warp, i.operands[1], a);
  uint32_t result = a[std::countr_zero(mask)];
  for (int lane = std::countr_zero(mask) + 1; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const uint32_t x = a[lane];
    const bool less = i.type == Type::s32 ? int32_t(x) < int32_t(result) : x < result;
    switch (i.data[0]) {
      case add_: result += x; break;
      case min_: result = less ? x : result; break;
      case max_: result = less ? result : x; break;
      case and_: result &= x; break;
      case or_: result |= x; break;
      default: result ^= x; break;
    }
  }
  std::fill(d, d + kLanes, result);
  store(warp, i.operands[0], d, mask);
  return true;
}

bool active_mask(Warp& warp, const Instruction& i, uint32_t mask) {
  uint32_t d[kLanes];
  std::fill(d, d + kLanes, mask);
  store(warp, i.operands[0], d, mask);
  return true;
}

// Elects the lowest member.
bool elect(Warp& warp, const Instruction& i, uint32_t mask) {
  if (!members_here(warp, i, i.operands[1], mask)) return false;
  uint32_t d[kLanes];
  const int leader = std::countr_zero(mask);
  std::fill(d, d + kLanes, static_cast<uint32_t>(leader));
  store(warp, i.operands[0], d, mask);
  if (!i.operands[0].elements.empty()) put_predicate(warp, i.operands[0].elements[0], 1u << leader, mask);
  return true;
}

bool sync_warp(Warp& warp, const Instruction& i, uint32_t mask) {
  const uint32_t members = members_here(warp, i, i.operands[0], mask);
  if (members) synchronise(warp, members);
  return members != 0;
}

// Index of the modifier that is one of `names`.
uint32_t which(const Instruction& i, std::initializer_list<const char*> names) {
  uint32_t index = 0;
  for (const char* name : names) {
    if (i.has(name)) return index;
    ++index;
  }
  unsupported(i);
}

}  // namespace

bool bind_warp(Instruction& i) {
  size_t operands = 3;
  if (i.opcode == "shfl") {
    operands = 5;
    i.data[0] = which(i, {"up", "down", "bfly", "idx"});
    i.execute = shuffle;
  } else if (i.opcode == "vote") {
    i.data[0] = which(i, {"all", "any", "uni", "ballot"});
    i.execute = vote;
  } else if (i.opcode == "match") {
    i.data[0] = which(i, {"all", "any"});
    i.execute = match;
  } else if (i.opcode == "redux") {
    i.data[0] = which(i, {"add", "min", "max", "and", "or", "xor"});
    if (bits_of(i.type) != 32 || i.type == Type::f32) unsupported(i);
    i.execute = reduce;
  } else if (i.opcode == "activemask") {
    operands = 1;
    i.execute = active_mask;
  } else if (i.opcode == "elect") {
    operands = 2;
    i.execute = elect;
  } else if (i.opcode == "bar" && i.has("warp")) {
    operands = 1;
    i.execute = sync_warp;
  } else {
    return false;
  }
  if (i.operands.size() != operands || (i.opcode != "activemask" && !i.has("sync"))) unsupported(i);
  return true;
}

}  // namespace hoppersim
