// Within a warp: shfl, vote, match, redux, activemask, elect, bar.warp.sync. They wait until all members are at the
// instruction.
#include <algorithm>
#include <bit>
#include <vector>

#include "core.h"
#include "order.h"

namespace hoppersim {

namespace {

enum Shuffle : uint32_t { up_, down_, bfly_, idx_ };
enum Vote : uint32_t { all_, any_, uni_, ballot_ };
enum Reduce : uint32_t { add_, min_, max_, and_, or_, xor_ };
constexpr uint32_t kPoison = 0xdeadbeef;  // what a shuffle reads from a lane that takes no part

// Lanes that give the same member mask, as the tiles of a warp do.
struct Team {
  uint32_t members, lanes;
};

std::vector<Team> teams_of(const Warp& warp, const Instruction& i, const Operand& operand, uint32_t mask) {
  std::vector<Team> teams;
  for (uint32_t left = mask; left; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const auto members = static_cast<uint32_t>(operand_value(warp, operand, lane));
    if (members == 0) fault("member mask", warp, i, "is empty", lane);
    if (!(members >> lane & 1)) fault("member mask", warp, i, "the lane is not in its own mask", lane);
    const auto team = std::find_if(teams.begin(), teams.end(), [&](const Team& t) { return t.members == members; });
    if (team == teams.end()) {
      teams.push_back({members, 1u << lane});
    } else {
      team->lanes |= 1u << lane;
    }
  }
  return teams;
}

void check_team(const Warp& warp, const Instruction& i, const Team& team, uint32_t mask) {
  const uint32_t others = team.members & warp.alive & ~team.lanes;
  if (others == 0) return;
  const int lane = std::countr_zero(others);
  if (mask >> lane & 1) fault("member mask", warp, i, "names a lane whose own mask is another", lane);
  fault("member mask", warp, i, "names a lane whose guard is false", lane);
}

// body(lanes) for each team whose members are all here. The lanes of the others stay, in a group of their own; false if
// all do.
template <class Body>
bool each_team(Warp& warp, const Instruction& i, const Operand& operand, uint32_t mask, Body body) {
  Group& group = *warp.current;
  const std::vector<Team> teams = teams_of(warp, i, operand, mask);
  uint32_t stay = 0;
  for (const Team& team : teams)
    if (team.members & warp.alive & ~group.mask) stay |= team.lanes;
  if (stay == mask) return converged(warp, i, teams.front().members, group.mask);
  for (const Team& team : teams) {
    if (team.lanes & stay) continue;
    check_team(warp, i, team, mask);
    share(warp, team.lanes);
    body(team.lanes);
  }
  if (stay != 0) {
    group.mask &= ~stay;
    warp.groups.push_back({group.pc - 1, stay});
  }
  return true;
}

void put_predicate(Warp& warp, const Operand& target, uint32_t result, uint32_t mask) {
  if (target.kind != Operand::Kind::predicate) return;
  uint32_t& bits = warp.predicates[target.index];
  bits = (bits & ~mask) | (result & mask);
}

void shuffle(Warp& warp, const Instruction& i, uint32_t mask) {
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
}

void vote(Warp& warp, const Instruction& i, uint32_t mask) {
  const uint32_t holds = predicate_mask(warp, i.operands[1]) & mask;
  if (i.data[0] == ballot_) {
    uint32_t d[kLanes];
    std::fill(d, d + kLanes, holds);
    return store(warp, i.operands[0], d, mask);
  }
  const bool result = i.data[0] == all_ ? holds == mask : i.data[0] == any_ ? holds != 0 : holds == mask || holds == 0;
  put_predicate(warp, i.operands[0], result ? kAll : 0, mask);
}

void match(Warp& warp, const Instruction& i, uint32_t mask) {
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
}

void reduce(Warp& warp, const Instruction& i, uint32_t mask) {
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
}

bool active_mask(Warp& warp, const Instruction& i, uint32_t mask) {
  uint32_t d[kLanes];
  std::fill(d, d + kLanes, mask);
  store(warp, i.operands[0], d, mask);
  return true;
}

// Elects the lowest member.
void elect(Warp& warp, const Instruction& i, uint32_t mask) {
  uint32_t d[kLanes];
  const int leader = std::countr_zero(mask);
  std::fill(d, d + kLanes, static_cast<uint32_t>(leader));
  store(warp, i.operands[0], d, mask);
  if (!i.operands[0].elements.empty()) put_predicate(warp, i.operands[0].elements[0], 1u << leader, mask);
}

void sync_warp(Warp& warp, const Instruction&, uint32_t mask) { synchronise(warp, mask); }

// The instruction by its teams; `operand`: the position of the member mask.
template <auto body, int operand>
bool by_team(Warp& warp, const Instruction& i, uint32_t mask) {
  return each_team(warp, i, i.operands[operand], mask, [&](uint32_t lanes) { body(warp, i, lanes); });
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
    i.execute = by_team<shuffle, 4>;
  } else if (i.opcode == "vote") {
    i.data[0] = which(i, {"all", "any", "uni", "ballot"});
    i.execute = by_team<vote, 2>;
  } else if (i.opcode == "match") {
    i.data[0] = which(i, {"all", "any"});
    i.execute = by_team<match, 2>;
  } else if (i.opcode == "redux") {
    i.data[0] = which(i, {"add", "min", "max", "and", "or", "xor"});
    if (bits_of(i.type) != 32 || i.type == Type::f32) unsupported(i);
    i.execute = by_team<reduce, 2>;
  } else if (i.opcode == "activemask") {
    operands = 1;
    i.execute = active_mask;
  } else if (i.opcode == "elect") {
    operands = 2;
    i.execute = by_team<elect, 1>;
  } else if (i.opcode == "bar" && i.has("warp")) {
    operands = 1;
    i.execute = by_team<sync_warp, 0>;
  } else {
    return false;
  }
  if (i.operands.size() != operands || (i.opcode != "activemask" && !i.has("sync"))) unsupported(i);
  return true;
}

}  // namespace hoppersim
