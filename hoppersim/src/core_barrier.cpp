// bar and barrier.cta (sync, arrive, red), membar and fence.
#include <algorithm>
#include <bit>

#include "core.h"
#include "order.h"

namespace hoppersim {

namespace {

enum Kind : uint32_t { sync_, arrive_, red_popc_, red_and_, red_or_ };

// Without a count a barrier is complete when every warp that has not exited is there.
uint32_t target_of(const Cta& cta, const Cta::NamedBarrier& barrier) {
  if (barrier.expected != 0) return barrier.expected;
  uint32_t threads = 0;
  for (const auto& warp : cta.warps) threads += warp->alive != 0 ? kLanes : 0;
  return threads;
}

void settle(const Cta& cta, Cta::NamedBarrier& barrier) {
  if (barrier.arrived == 0 || barrier.arrived < target_of(cta, barrier)) return;
  barrier.completed_clock = std::move(barrier.clock);
  barrier.completed_true_count = barrier.true_count;
  barrier.completed_count = barrier.arrived;
  barrier.clock.clear();
  barrier.expected = barrier.arrived = barrier.true_count = 0;
  ++barrier.generation;
}

uint32_t uniform(Warp& warp, const Instruction& i, const Operand& operand, uint32_t mask) {
  const uint32_t first = static_cast<uint32_t>(operand_value(warp, operand, std::countr_zero(mask)));
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1) && operand_value(warp, operand, lane) != first)
      fault("divergent barrier operands", warp, i, operand.name + " differs between lanes", lane);
  }
  return first;
}

Cta::NamedBarrier& join(Warp& warp, const Instruction& i, uint32_t id, uint32_t count, uint32_t mask) {
  Cta::NamedBarrier& barrier = warp.cta->named[id];
  if (count % kLanes != 0 || count > kLanes * warp.cta->warps.size()) {
    fault("barrier count", warp, i, std::to_string(count) + " threads: must be a multiple of 32, at most the CTA's");
  }
  if (barrier.arrived != 0 && barrier.expected != count) {
    fault("barrier count", warp, i,
          "barrier " + std::to_string(id) + " waits for " + std::to_string(barrier.expected) + " threads, here for " +
              std::to_string(count));
  }
  barrier.expected = count;
  barrier.arrived += mask == warp.alive ? kLanes : static_cast<uint32_t>(std::popcount(mask));
  fence_of_barrier(warp, mask);
  release(barrier.clock, warp, mask);
  ++warp.step;
  return barrier;
}

void give_result(Warp& warp, const Instruction& i, const Cta::NamedBarrier& barrier, uint32_t mask, uint32_t threads) {
  const bool result =
      i.data[0] == red_and_ ? barrier.completed_true_count == threads : barrier.completed_true_count > 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (mask >> lane & 1)
      set_register(warp, i.operands[0], lane, i.data[0] == red_popc_ ? barrier.completed_true_count : result);
  }
}

// data[0]: Kind, data[1]: index of the barrier operand, data[2]: of the count (0: none), data[3]: of the predicate
bool execute(Warp& warp, const Instruction& i, uint32_t mask) {
  const uint32_t id = uniform(warp, i, i.operands[i.data[1]], mask);
  if (id > 15) fault("barrier count", warp, i, "barrier " + std::to_string(id) + " does not exist");
  Cta::NamedBarrier& barrier = warp.cta->named[id];
  Group& group = *warp.current;
  if (group.ticket == 0) {
    const uint32_t count = i.data[2] ? uniform(warp, i, i.operands[i.data[2]], mask) : 0;
    group.ticket = barrier.generation + 1;
    join(warp, i, id, count, mask);
    if (i.data[0] >= red_popc_)
      barrier.true_count += static_cast<uint32_t>(std::popcount(predicate_mask(warp, i.operands[i.data[3]]) & mask));
    settle(*warp.cta, barrier);
    if (i.data[0] == arrive_) return true;
  }
  if (barrier.generation < group.ticket) {
    warp.waiting_for = "barrier " + std::to_string(id);
    const uint64_t ticket = group.ticket;
    Cta* cta = warp.cta;
    warp.can_resume = [cta, id, ticket] {
      settle(*cta, cta->named[id]);
      return cta->named[id].generation >= ticket;
    };
    return false;
  }
  acquire(warp, barrier.completed_clock, mask);
  fence_of_barrier(warp, mask);
  if (i.data[0] >= red_popc_) {
    uint32_t threads = 0;
    for (const auto& other : warp.cta->warps) threads += static_cast<uint32_t>(std::popcount(other->alive));
    give_result(warp, i, barrier, mask, i.data[2] ? uniform(warp, i, i.operands[i.data[2]], mask) : threads);
  }
  return true;
}

bool nothing(Warp&, const Instruction&, uint32_t) { return true; }

enum Memory : uint32_t { own_ = 1, others_ = 2, global_ = 4 };  // data[0] of a proxy fence

bool fence_proxy(Warp& warp, const Instruction& i, uint32_t mask) {
  Cluster& cluster = *warp.cta->cluster;
  for (const auto& cta : cluster.ctas) {
    if (i.data[0] & (cta.get() == warp.cta ? own_ : others_)) add_fence(cta->fences, warp, i, mask);
  }
  if (i.data[0] & global_) add_fence(cluster.order->global_fences, warp, i, mask);
  ++warp.step;
  return true;
}

// Orders the initialisations of mbarriers that the lanes know of before a later arrival, a relaxed one too;
// mbarrier_init (data[0]): also before their use by the async proxy, and nothing else.
bool fence_memory(Warp& warp, const Instruction& i, uint32_t mask) {
  for (auto& [offset, barrier] : warp.cta->mbarriers) {
    if (barrier.fenced.step && (!i.data[0] || barrier.async_fenced.step)) continue;
    uint32_t lanes = 0;  // that know of it
    for (uint32_t left = mask; left; left &= left - 1)
      if (knows(warp, std::countr_zero(left), barrier.initialised, 1, true)) lanes |= left & -left;
    if (lanes == 0) continue;
    if (!barrier.fenced.step) barrier.fenced = event_of(warp, lanes);
    if (i.data[0] && !barrier.async_fenced.step) barrier.async_fenced = event_of(warp, lanes);
  }
  if (i.data[0]) {
    ++warp.step;
  } else {
    fence(warp, mask);
  }
  return true;
}

bool bind_fence(Instruction& i) {
  if (i.has("tensormap::generic")) return false;  // async_tensormap.cpp
  static const char* const known[] = {"proxy",
                                      "async",
                                      "async::generic",
                                      "sync_restrict::shared::cta",
                                      "sync_restrict::shared::cluster",
                                      "async.global",
                                      "async::global",
                                      "async.shared::cta",
                                      "global",
                                      "shared::cta",
                                      "shared::cluster",
                                      "alias",
                                      "generic",
                                      "acquire",
                                      "release",
                                      "acq_rel",
                                      "sc",
                                      "cta",
                                      "cluster",
                                      "gpu",
                                      "gl",
                                      "sys",
                                      "mbarrier_init",
                                      "relaxed"};
  for (const std::string& m : i.modifiers) {
    if (std::none_of(std::begin(known), std::end(known), [&](const char* k) { return m == k; }))
      unsupported(i, "modifier " + m);
  }
  if (!i.has("proxy")) {
    i.data[0] = i.has("mbarrier_init");
    i.execute = fence_memory;
    return true;
  }
  const bool global = i.has("global") || i.has("async.global") || i.has("async::global");
  const bool own = i.has("shared::cta") || i.has("async.shared::cta"), shared = own || i.has("shared::cluster");
  i.data[0] = global ? +global_ : own ? +own_ : shared ? own_ | others_ : own_ | others_ | global_;
  i.execute = i.has("alias") ? nothing : fence_proxy;
  return true;
}

}  // namespace

bool bind_barrier(Instruction& i) {
  if (i.opcode == "membar" || i.opcode == "fence") return bind_fence(i);
  if ((i.opcode != "bar" && i.opcode != "barrier") || i.has("cluster") || i.has("warp")) return false;
  const size_t n = i.operands.size();
  i.data[1] = 0;
  if (i.has("red")) {
    if (n != 3 && n != 4) unsupported(i);
    i.data[0] = i.has("popc") ? red_popc_ : i.has("and") ? red_and_ : red_or_;
    i.data[1] = 1;
    i.data[2] = n == 4 ? 2 : 0;
    i.data[3] = static_cast<uint32_t>(n - 1);
  } else if (i.has("sync") || i.has("arrive")) {
    i.data[0] = i.has("arrive") ? arrive_ : sync_;
    i.data[2] = n == 2 ? 1 : 0;
    if (n < 1 || n > 2 || (n == 1 && i.has("arrive"))) unsupported(i);
  } else {
    unsupported(i);
  }
  i.execute = execute;
  return true;
}

}  // namespace hoppersim
