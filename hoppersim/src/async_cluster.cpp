// mapa, getctarank, barrier.cluster, griddepcontrol; the ends of the CTAs of a cluster.
#include <algorithm>
#include <bit>

#include "async.h"
#include "order.h"

namespace hoppersim {
namespace {

bool map_address(Warp& warp, const Instruction& i, uint32_t mask) {
  const bool generic = i.data[0];
  const auto ranks = warp.cta->cluster->ctas.size();
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const SharedPlace place =
        shared_place(warp, i, operand_value(warp, i.operands[1], lane), 1, generic ? Space::generic : Space::shared);
    const uint64_t rank = operand_value(warp, i.operands[2], lane) & 0xffffffffu;
    if (rank >= ranks)
      fault("no such CTA", warp, i, "rank " + std::to_string(rank) + " in a cluster of " + std::to_string(ranks), lane);
    set_register(warp, i.operands[0], lane, (generic ? kSharedWindow : 0) + rank * kRankStride + place.offset);
  }
  return true;
}

bool rank_of_address(Warp& warp, const Instruction& i, uint32_t mask) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const SharedPlace place =
        shared_place(warp, i, operand_value(warp, i.operands[1], lane), 1, i.data[0] ? Space::generic : Space::shared);
    set_register(warp, i.operands[0], lane, static_cast<uint32_t>(place.cta->rank));
  }
  return true;
}

// ---- barrier.cluster: complete when every lane of the cluster that has not exited has arrived
bool try_complete(Cluster& cluster) {
  bool any = false;
  for (const auto& cta : cluster.ctas) {
    for (const auto& warp : cta->warps) {
      const uint32_t arrived = copies_of(*warp).cluster_arrived;
      if (warp->state != Warp::State::done && warp->alive & ~arrived) return false;
      any |= arrived != 0;
    }
  }
  if (!any) return false;
  Cta::NamedBarrier& barrier = cluster.barrier;
  ++barrier.generation;
  merge(barrier.completed_clock, barrier.clock);
  barrier.clock.clear();
  merge(barrier.completed_weak, barrier.weak);
  barrier.weak.clear();
  barrier.arrived = 0;
  for (const auto& cta : cluster.ctas)
    for (const auto& warp : cta->warps) copies_of(*warp).cluster_arrived = 0;
  return true;
}

bool cluster_arrive(Warp& warp, const Instruction& i, uint32_t mask) {
  WarpCopies& copies = copies_of(warp);
  if (copies.cluster_waiting & mask)
    fault("barrier.cluster misuse", warp, i, "arrives again without barrier.cluster.wait",
          std::countr_zero(copies.cluster_waiting & mask));
  Cta::NamedBarrier& barrier = warp.cta->cluster->barrier;
  copies.cluster_arrived |= mask;
  copies.cluster_waiting |= mask;
  barrier.arrived += static_cast<uint32_t>(std::popcount(mask));
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) copies.cluster_generation[lane] = barrier.generation;
  if (i.has("relaxed")) {
    release(barrier.weak, warp, mask);
    merge(barrier.clock, warp.fenced);
  } else {
    fence_of_barrier(warp, mask);
    release(barrier.clock, warp, mask);
  }
  merge(barrier.weak, warp.weak);
  ++warp.step;
  try_complete(*warp.cta->cluster);
  return true;
}

bool cluster_wait(Warp& warp, const Instruction& i, uint32_t mask) {
  WarpCopies& copies = copies_of(warp);
  if (mask & ~copies.cluster_waiting)
    fault("barrier.cluster misuse", warp, i, "waits without barrier.cluster.arrive",
          std::countr_zero(mask & ~copies.cluster_waiting));
  Cluster& cluster = *warp.cta->cluster;
  uint64_t generation = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) generation = std::max(generation, copies.cluster_generation[lane]);
  if (cluster.barrier.generation <= generation) {
    warp.waiting_for = "barrier.cluster";
    warp.state = Warp::State::waiting;
    // Lanes that exit instead of arriving complete the barrier too, so ask again each time.
    warp.can_resume = [&cluster, generation] {
      return cluster.barrier.generation > generation || try_complete(cluster);
    };
    return false;
  }
  copies.cluster_waiting &= ~mask;
  acquire(warp, cluster.barrier.completed_clock, mask);
  fence_of_barrier(warp, mask);
  merge(warp.weak, cluster.barrier.completed_weak);
  return true;
}

bool nothing(Warp&, const Instruction&, uint32_t) { return true; }

}  // namespace

void access_remote(Warp& warp, const Instruction& i, Cta& target, int lane) {
  if (target.ended)
    return report("access to an ended CTA", warp, i, "the CTA whose shared memory this is has ended", lane);
  Cta::RemoteAccess& last = target.remote_accesses[warp.clock_index()];
  const uint32_t earlier = last.event.step == warp.step ? last.event.lanes : 0;
  last = {&warp, &i, lane, event_of(warp, earlier | 1u << lane)};
}

void warp_ended(Warp& warp) {
  Cta& cta = *warp.cta;
  merge(cta.exit_clock, view_of(warp, -1));
  merge(cta.exit_clock, warp.weak);
  cta.ended = std::all_of(cta.warps.begin(), cta.warps.end(),
                          [](const auto& other) { return other->state == Warp::State::done; });
  if (!cta.ended) return;
  for (const auto& [index, access] : cta.remote_accesses) {
    if (knows(cta.exit_clock, access.event, 1, false)) continue;
    report("access to an ended CTA", *access.warp, *access.instruction,
           "no barrier orders it before the end of the CTA of rank " + std::to_string(cta.rank) +
               ", whose shared memory this is: it may come later",
           access.lane);
  }
}

bool bind_cluster(Instruction& i) {
  const size_t operands = i.operands.size();
  if (i.opcode == "mapa" && operands == 3 && only(i, {"shared::cluster", "u32", "u64"})) {
    i.data[0] = !i.has("shared::cluster");
    i.execute = map_address;
  } else if (i.opcode == "getctarank" && operands == 2 && only(i, {"shared::cluster", "u32", "u64"})) {
    i.data[0] = !i.has("shared::cluster");
    i.execute = rank_of_address;
  } else if (i.opcode == "barrier" && !i.modifiers.empty() && i.modifiers[0] == "cluster" && operands == 0) {
    if (i.has("arrive") && only(i, {"cluster", "arrive", "release", "relaxed", "aligned"})) {
      i.execute = cluster_arrive;
    } else if (i.has("wait") && only(i, {"cluster", "wait", "acquire", "aligned"})) {
      i.execute = cluster_wait;
    } else {
      return false;
    }
  } else if (i.opcode == "griddepcontrol" && i.modifiers.size() == 1 && only(i, {"launch_dependents", "wait"})) {
    // Launches run one after the other: the grids before this one have ended.
    i.execute = nothing;
  } else {
    return false;
  }
  return true;
}

}  // namespace hoppersim
