// Accesses by the async proxy, and the proxy fences that they need.
#include <algorithm>
#include <bit>
#include <cstdio>

#include "core.h"
#include "races_granule.h"
#include "report.h"

namespace hoppersim {

namespace {

// What the issuer knows; its own accesses are ordered by its program.
struct View {
  explicit View(const Issue& issue)
      : issue(issue),
        own(static_cast<uint32_t>(issue.warp->clock_index())),
        self(issue.lane < 0 ? kAll : 1u << issue.lane) {
    if (!issue.warp->partial.empty()) merged = view_of(*issue.warp, issue.lane);
    clock = issue.warp->partial.empty() ? &issue.warp->clock : &merged;
  }
  bool knows(const Stamp& stamp, uint16_t bytes, bool write) const {
    return stamp.step <= (*clock)[stamp.agent].all ||
           hoppersim::knows(*clock, stamp, bytes, write, stamp.agent == own ? self : 0);
  }
  // By a proxy fence that it knows of.
  bool fenced(const ProxyFences& fences, const Stamp& stamp, uint16_t bytes) const {
    return find_fence(fences, stamp, bytes, *clock, own, self) != nullptr;
  }
  const Issue& issue;
  uint32_t own, self;
  Clock merged;
  const Clock* clock;
};

// What is missing between a write and an access that knows of it.
std::string missing_fence(const Cluster& cluster, const ProxyFences& fences, const Stamp& write, uint16_t bytes,
                          const char* memory) {
  const Clock everything(cluster.order->agents, Known{~0u, 0, 0});
  const ProxyFence* fence = find_fence(fences, write, bytes, everything, 0, 0);
  if (fence == nullptr) return std::string(", without a fence.proxy.async ") + memory + " after it";
  return ", and nothing orders the fence.proxy.async after it, by " + name_of(cluster, fence->event, 0) +
         ", before this: it must come before the arrival or barrier that orders the two";
}

// What threads wrote must be known, and known to a proxy fence unless the access is that of an st.async.
void require_write(const View& view, Cta& cta, uint32_t g, uint16_t bytes, const Stamp& old, const char* verb,
                   bool fenced = true) {
  if (!(old.bytes & bytes)) return;
  const Issue& issue = view.issue;
  const bool known = view.knows(old, bytes, true);
  if (!old.generic || !fenced) {
    if (!known) race(*issue.warp, *issue.instruction, issue.lane, verb, g, bytes, old, true);
    return;
  }
  if (known && view.fenced(cta.fences, old, bytes)) return;
  const std::string what = std::string(verb) + " " + place_name(g, bytes & old.bytes) + ", which was written by " +
                           name_of(*cta.cluster, old, bytes);
  if (!known) return report("unsynchronised shared memory", issue, what + ", and no barrier orders the two");
  report("missing proxy fence", issue, what + missing_fence(*cta.cluster, cta.fences, old, bytes, "of that memory"));
}

Stamp async_stamp(const Issue& issue, uint16_t bytes, Completion completion) {
  Stamp stamp;
  stamp.step = completion.step;
  stamp.lanes = static_cast<uint32_t>(issue.warp->clock_index() * kLanes + std::max(issue.lane, 0));
  stamp.agent = static_cast<uint16_t>(completion.agent);
  stamp.bytes = bytes;
  stamp.pc = issue.instruction->pc;
  return stamp;
}

}  // namespace

Completion completion_of(Cta& cta, uint32_t offset, Mbarrier& barrier, uint32_t phase) {
  const size_t agent = barrier_agent(cta, offset, barrier);
  return {agent, barrier.first_step + phase + 1};
}

void check_async_read(const Issue& issue, Cta& cta, const Range& range) {
  const View view(issue);
  each_granule(range, [&](uint32_t g, uint16_t bytes) {
    each_write(cta.shared, cta.shared.granules[g],
               [&](Stamp& old) { require_write(view, cta, g, bytes, old, "reads"); });
  });
}

void note_async_read(const Issue& issue, Cta& cta, const Range& range, Completion completion) {
  check_async_read(issue, cta, range);
  each_granule(range, [&](uint32_t g, uint16_t bytes) {
    add_read(*issue.warp, cta.shared, cta.shared.granules[g], async_stamp(issue, bytes, completion));
  });
}

void note_async_write(const Issue& issue, Cta& cta, const Range& range, Completion completion, LoadKind kind) {
  const View view(issue);
  const bool reduces = kind == LoadKind::reduction;
  each_granule(range, [&](uint32_t g, uint16_t bytes) {
    Granule& granule = cta.shared.granules[g];
    each_write(cta.shared, granule, [&](Stamp& old) {
      if (!(old.strong && !old.generic && reduces)) {
        require_write(view, cta, g, bytes, old, "writes", kind != LoadKind::st_async);
      }
    });
    each_read(cta.shared, granule, [&](Stamp& old) {
      if (old.bytes & bytes && !view.knows(old, bytes, false))
        race(*issue.warp, *issue.instruction, issue.lane, "writes", g, bytes, old, false);
    });
    Stamp stamp = async_stamp(issue, bytes, completion);
    stamp.strong = reduces;
    add_write(cta.shared, granule, stamp);
  });
}

void note_thread_copy(const Issue& issue, Cta& cta, const Range& range, Completion completion) {
  each_granule(range, [&](uint32_t g, uint16_t bytes) {
    Stamp stamp = async_stamp(issue, bytes, completion);
    stamp.generic = 1;
    add_write(cta.shared, cta.shared.granules[g], stamp);
  });
}

// ---- Global memory
void note_global_writes(Warp& warp, const Instruction& i, Space space, const uint64_t* addresses, uint32_t mask,
                        size_t size) {
  if (!warp.cta->cluster->launch->function->loads_bulk || (space != Space::global && space != Space::generic)) return;
  Order& order = *warp.cta->cluster->order;
  for (uint32_t left = mask; left; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const uint64_t address = addresses[lane];
    if (address >= kSharedWindow) continue;
    for (uint64_t g = address / 16; g <= (address + size - 1) / 16; ++g) {
      Stamp& stamp = order.global_writes[g];
      if (stamp.step != warp.step || stamp.agent != warp.clock_index()) stamp = {};
      stamp.step = warp.step;
      stamp.agent = static_cast<uint16_t>(warp.clock_index());
      stamp.lanes |= 1u << lane;
      stamp.bytes = 0xffff;
      stamp.pc = i.pc;
    }
    order.global_pages.insert(address / 4096);
    order.global_pages.insert((address + size - 1) / 4096);
  }
}

void check_global_fence(const Issue& issue, uint64_t address, uint64_t size) {
  const Warp& warp = *issue.warp;
  const Cluster& cluster = *warp.cta->cluster;
  const Order& order = *cluster.order;
  if (order.global_pages.empty() || size == 0) return;
  for (uint64_t g = address / 16; g <= (address + size - 1) / 16; ++g) {
    if (!order.global_pages.count(g / 256)) {
      g |= 255;  // the last of its page
      continue;
    }
    const auto found = order.global_writes.find(g);
    if (found == order.global_writes.end()) continue;
    const Stamp& stamp = found->second;
    const View view(issue);
    if (!view.knows(stamp, 0xffff, true) || view.fenced(order.global_fences, stamp, 0xffff)) continue;
    char place[40];
    std::snprintf(place, sizeof place, "global address 0x%llx", static_cast<unsigned long long>(g * 16));
    return report("missing proxy fence", issue,
                  std::string("reads ") + place + ", which was written by " + name_of(cluster, stamp, 0xffff) +
                      missing_fence(cluster, order.global_fences, stamp, 0xffff, "(or .global)"));
  }
}

}  // namespace hoppersim
