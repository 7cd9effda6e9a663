#include "order.h"

#include <algorithm>
#include <bit>

#include "core.h"

namespace hoppersim {

namespace {

void merge(Known& into, const Known& from) {
  into.all = std::max(into.all, from.all);
  if (from.some > from.all) {
    into.lanes = into.some > into.all ? into.lanes | from.lanes : from.lanes;
    into.some = std::max(into.some, from.some);
  }
}

bool whole(const Warp& warp, uint32_t lanes) { return (warp.alive & ~lanes) == 0; }

// Adds what these lanes know.
void learn(Clock& into, const Warp& warp, uint32_t lanes) {
  merge(into, warp.clock);
  for (const Warp::Partial& partial : warp.partial) {
    if (partial.lanes & lanes) merge(into, partial.clock);
  }
}

constexpr size_t kFences = 16;  // of a warp that are told apart; older ones count as known

// Adds what the lanes of the fence have done.
void cover_own(Clock& covered, const Stamp& fence) {
  merge(covered[fence.agent], fence.lanes == kAll ? Known{fence.step, 0, 0} : Known{0, fence.step, fence.lanes});
}

// The slots of the addresses of these lanes, as a bit mask.
uint64_t slots_of(const uint64_t* addresses, uint32_t mask, bool shared) {
  uint64_t slots = 0, last = ~0ull;
  for (uint32_t left = mask; left; left &= left - 1) {
    const uint64_t block = addresses[std::countr_zero(left)] >> (shared ? 4 : 7);
    if (block == last) continue;
    last = block;
    slots |= 1ull << (block * 0x9e3779b97f4a7c15ull >> 58);
  }
  return slots;
}

}  // namespace

void merge(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t k = 0; k < from.size(); ++k) merge(into[k], from[k]);
}

void begin_order(Cluster& cluster) {
  cluster.order = std::make_shared<Order>();
  const size_t warps = cluster.ctas[0]->warps.size(), groups = (warps + 3) / 4;
  cluster.order->agents = cluster.ctas.size() * (warps + groups);
  cluster.order->warpgroups.resize(cluster.ctas.size() * groups);
  for (auto& cta : cluster.ctas) {
    for (auto& warp : cta->warps) warp->clock.resize(cluster.order->agents);
  }
}

size_t warpgroup_agent(const Warp& warp) {
  const size_t warps = warp.cta->warps.size(), groups = (warps + 3) / 4;
  return warp.cta->cluster->ctas.size() * warps + warp.cta->rank * groups + warp.id / 4;
}

size_t barrier_agent(Cta& cta, uint32_t offset, Mbarrier& barrier) {
  if (barrier.agent < 0) {
    auto [found, created] = cta.barrier_agents.try_emplace(offset, -1, 0);
    if (created) {
      Order& order = *cta.cluster->order;
      found->second.first = static_cast<int32_t>(order.agents++);
      for (auto& other : cta.cluster->ctas) {
        for (auto& warp : other->warps) warp->clock.resize(order.agents);
      }
    }
    barrier.agent = found->second.first;
    barrier.first_step = found->second.second;
  }
  return static_cast<size_t>(barrier.agent);
}

void release(Clock& into, const Warp& warp, uint32_t lanes) {
  learn(into, warp, lanes);
  const bool all = whole(warp, lanes);
  merge(into[warp.clock_index()], all ? Known{warp.step, 0, 0} : Known{0, warp.step, lanes});
}

void acquire(Warp& warp, const Clock& clock, uint32_t lanes) {
  if (whole(warp, lanes) || warp.partial.size() >= kLanes) return merge(warp.clock, clock);
  for (Warp::Partial& partial : warp.partial) {
    if (partial.lanes == lanes) return merge(partial.clock, clock);
  }
  warp.partial.push_back({lanes, clock});
}

void synchronise(Warp& warp, uint32_t lanes) {
  if (whole(warp, lanes)) {
    for (const Warp::Partial& partial : warp.partial) merge(warp.clock, partial.clock);
    warp.partial.clear();
    Known& own = warp.clock[warp.clock_index()];
    own.all = std::max(own.all, warp.step);
  } else {
    Clock clock;
    release(clock, warp, lanes);
    acquire(warp, clock, lanes);
  }
  ++warp.step;
}

void share(Warp& warp, uint32_t lanes) {
  Clock clock;
  for (const Warp::Partial& partial : warp.partial) {
    if (partial.lanes & lanes) merge(clock, partial.clock);
  }
  const auto own = static_cast<size_t>(warp.clock_index());
  if (own < clock.size()) clock[own] = {};
  if (!clock.empty()) acquire(warp, clock, lanes);
}

void fence(Warp& warp, uint32_t lanes) {
  if (!warp.relaxed.empty()) {
    merge(warp.clock, warp.relaxed);
    warp.relaxed.clear();
  }
  release(warp.fenced, warp, lanes);
  ++warp.step;
}

void fence_of_barrier(Warp& warp, uint32_t lanes) {
  if (warp.cta->cluster->launch->function->polls) fence(warp, lanes);
}

void add_fence(ProxyFences& fences, const Warp& warp, const Instruction& i, uint32_t lanes) {
  const auto agent = static_cast<size_t>(warp.clock_index());
  if (fences.size() <= agent) fences.resize(agent + 1);
  auto& own = fences[agent];
  ProxyFence fence{event_of(warp, whole(warp, lanes) ? kAll : lanes), {}};
  fence.event.pc = i.pc;
  if (!own.empty()) {
    fence.covered = own.back().covered;
    cover_own(fence.covered, own.back().event);
  }
  learn(fence.covered, warp, lanes);
  own.push_back(std::move(fence));
  if (own.size() <= kFences) return;
  own.pop_front();
  ProxyFence& oldest = own.front();
  cover_own(oldest.covered, oldest.event);
  oldest.event.step = 0;
  oldest.event.lanes = kAll;
}

const ProxyFence* find_fence(const ProxyFences& fences, const Stamp& stamp, uint16_t bytes, const Clock& clock,
                             size_t own, uint32_t lanes) {
  auto of_warp = [&](size_t agent) -> const ProxyFence* {
    if (agent >= fences.size()) return nullptr;
    const Known known = agent < clock.size() ? clock[agent] : Known{};
    for (auto fence = fences[agent].rbegin(); fence != fences[agent].rend(); ++fence) {
      const uint32_t step = fence->event.step;
      uint32_t executed = agent == own ? lanes : 0;
      if (step <= known.some) executed |= known.lanes;
      if (step <= known.all) executed = kAll;
      executed &= fence->event.lanes;
      if (executed == 0) continue;
      const bool before = stamp.agent == agent && stamp.step <= step;
      return knows(fence->covered, stamp, bytes, true, before ? executed : 0) ? &*fence : nullptr;
    }
    return nullptr;
  };
  if (const ProxyFence* found = of_warp(stamp.agent)) return found;  // most often
  for (size_t agent = 0; agent < fences.size(); ++agent) {
    if (const ProxyFence* found = of_warp(agent)) return found;
  }
  return nullptr;
}

bool normalise(Space space, uint64_t& address) {
  if (space == Space::shared) return true;
  if (space != Space::generic || address < kSharedWindow || address >= kLocalWindow) return false;
  address -= kSharedWindow;
  return true;
}

void acquire_addresses(Warp& warp, const Instruction& i, const uint64_t* addresses, uint32_t mask, bool shared) {
  Order& order = *warp.cta->cluster->order;
  for (uint64_t slots = slots_of(addresses, mask, shared); slots; slots &= slots - 1) {
    const Order::Slot& slot = (shared ? order.shared_slots : order.global_slots)[std::countr_zero(slots)];
    merge(warp.weak, slot.weak);
    if (slot.clock.empty()) continue;
    if (i.acquires) {
      acquire(warp, slot.clock, mask);
    } else {
      merge(warp.relaxed, slot.clock);
      merge(warp.weak, slot.clock);
    }
  }
}

void release_addresses(Warp& warp, const Instruction& i, const uint64_t* addresses, uint32_t mask, bool shared) {
  Order& order = *warp.cta->cluster->order;
  for (uint64_t slots = slots_of(addresses, mask, shared); slots; slots &= slots - 1) {
    Order::Slot& slot = (shared ? order.shared_slots : order.global_slots)[std::countr_zero(slots)];
    release(i.releases ? slot.clock : slot.weak, warp, mask);
    if (!i.releases) merge(slot.clock, warp.fenced);
    merge(slot.weak, warp.weak);
  }
  ++warp.step;
}

Stamp event_of(const Warp& warp, uint32_t lanes) {
  Stamp stamp;
  stamp.step = warp.step;
  stamp.lanes = lanes;
  stamp.agent = static_cast<uint16_t>(warp.clock_index());
  return stamp;
}

uint32_t lanes_of(const Stamp& stamp, uint16_t bytes) {
  if (stamp.share == 0 || stamp.share == kMixed) return stamp.lanes;
  uint32_t lanes = 0, left = stamp.lanes;
  for (uint32_t at = stamp.start; left; left &= left - 1, at += stamp.share) {
    const uint32_t own = ((1u << stamp.share) - 1) << at;
    if (own & bytes & stamp.bytes) lanes |= left & -left;
  }
  return lanes;
}

// Several lanes that wrote the same bytes wrote the same value, or a fault would have come: one that is known is
// enough.
bool knows(const Clock& clock, const Stamp& stamp, uint16_t bytes, bool write, uint32_t known_lanes) {
  const Known known = stamp.agent < clock.size() ? clock[stamp.agent] : Known{};
  if (stamp.step <= known.all) return true;
  if (stamp.step <= known.some) known_lanes |= known.lanes;
  if (known_lanes == 0) return false;
  const uint32_t lanes = lanes_of(stamp, bytes);
  if (stamp.share == kMixed || (write && stamp.share == 0)) return (lanes & known_lanes) != 0;
  return (lanes & ~known_lanes) == 0;
}

bool knows(const Warp& warp, int lane, const Stamp& stamp, uint16_t bytes, bool write) {
  if (stamp.step <= warp.clock[stamp.agent].all) return true;
  uint32_t known = 0;
  const uint32_t self = lane < 0 ? kAll : 1u << lane;
  if (stamp.agent == warp.clock_index()) known |= self;
  for (const Warp::Partial& partial : warp.partial) {
    if (!(partial.lanes & self) || stamp.agent >= partial.clock.size()) continue;
    const Known& k = partial.clock[stamp.agent];
    if (stamp.step <= k.all) return true;
    if (stamp.step <= k.some) known |= k.lanes;
  }
  return knows(warp.clock, stamp, bytes, write, known);
}

bool knows_step(const Warp& warp, size_t agent, uint32_t step) {
  if (agent == static_cast<size_t>(warp.clock_index())) return true;
  auto known = [&](const Clock& clock) {
    return agent < clock.size() && step <= std::max(clock[agent].all, clock[agent].some);
  };
  return known(warp.clock) ||
         std::any_of(warp.partial.begin(), warp.partial.end(), [&](const auto& p) { return known(p.clock); });
}

Clock view_of(const Warp& warp, int lane) {
  Clock clock;
  learn(clock, warp, lane < 0 ? kAll : 1u << lane);
  return clock;
}

}  // namespace hoppersim
