// Which accesses happen before which, by vector clocks (Clock in machine.h).
//
// A warp stamps its accesses with its step; what it releases (to a barrier, an arrival, an atomic) ends the step. What
// lanes release covers what they know and their own accesses; the other lanes' only up to the last bar.warp.sync. What
// some lanes acquire is Warp::partial until the warp synchronises. An access is ordered before another if the lanes
// that make the other know its step.
//
// Where PTX may order, order is assumed: atomic, volatile, relaxed and mmio accesses synchronise on their address
// (kSlots of them are told apart) from a fence before to a fence after, whatever their scope; the wait for a wgmma
// orders what its warpgroup did before, a fence covers all lanes.
#pragma once

#include <unordered_set>

#include "ptx.h"

namespace hoppersim {

constexpr size_t kSlots = 64;
constexpr uint32_t kMixed = 31;  // Stamp::share

struct Order {  // of a cluster
  size_t agents = 0;
  struct Slot {
    Clock clock, weak;  // released to addresses, and Warp::weak
  };
  Slot shared_slots[kSlots], global_slots[kSlots];
  std::vector<Clock> warpgroups;  // released by their commits
  ProxyFences global_fences;
  std::unordered_map<uint64_t, Stamp>
      global_writes;                          // by granule of 16 bytes, if the kernel loads with the copy engine
  std::unordered_set<uint64_t> global_pages;  // of 4096 bytes that have such
};

void begin_order(Cluster& cluster);

// Adds to a clock what these lanes know and have done. The caller ends the step when it has released all.
void release(Clock& into, const Warp& warp, uint32_t lanes);
void acquire(Warp& warp, const Clock& clock, uint32_t lanes);
// bar.warp.sync
void synchronise(Warp& warp, uint32_t lanes);
// shfl and its like: what lanes have acquired from others than their warp, all that take part know.
void share(Warp& warp, uint32_t lanes);
void fence(Warp& warp, uint32_t lanes);
// A barrier orders relaxed accesses as a fence does, before and after it.
void fence_of_barrier(Warp& warp, uint32_t lanes);

// fence.proxy.async: what the lanes know of and have done the async proxy sees, for whoever knows of the fence.
void add_fence(ProxyFences& fences, const Warp& warp, const Instruction& i, uint32_t lanes);
// One that came after the access and that the clock knows of, or `lanes` of the warp `own` have executed; or nullptr.
const ProxyFence* find_fence(const ProxyFences& fences, const Stamp& stamp, uint16_t bytes, const Clock& clock,
                             size_t own, uint32_t lanes);

// By a strong access to these addresses, of the lanes in `mask`: before it, and after it.
void acquire_addresses(Warp& warp, const Instruction& i, const uint64_t* addresses, uint32_t mask, bool shared);
void release_addresses(Warp& warp, const Instruction& i, const uint64_t* addresses, uint32_t mask, bool shared);

// Agents that are not warps.
size_t warpgroup_agent(const Warp& warp);
size_t barrier_agent(Cta& cta, uint32_t offset, Mbarrier& barrier);
// An address that is generic or shared -> what names the place for both, and whether it is shared.
bool normalise(Space space, uint64_t& address);

// What these lanes do now, as a stamp without bytes.
Stamp event_of(const Warp& warp, uint32_t lanes);
// The lanes that accessed any of these bytes.
uint32_t lanes_of(const Stamp& stamp, uint16_t bytes);
// Whether the clock knows that access to these bytes.
bool knows(const Clock& clock, const Stamp& stamp, uint16_t bytes, bool write, uint32_t known_lanes = 0);
// Whether the lane (-1: any lane) does.
bool knows(const Warp& warp, int lane, const Stamp& stamp, uint16_t bytes, bool write);
bool knows_step(const Warp& warp, size_t agent, uint32_t step);  // of any lane
// All that the lane (-1: any lane) knows.
Clock view_of(const Warp& warp, int lane);

}  // namespace hoppersim
