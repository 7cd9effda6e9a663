#include "tensor_map_proxy.h"

#include <atomic>
#include <mutex>

#include "order.h"

namespace hoppersim {

struct MapProxy {
  struct Write {
    uint64_t generation = 0;  // how often the map was written
    const Cluster* cluster = nullptr;
    size_t writer = 0;      // clock index
    uint32_t sequence = 0;  // its step at the write
    bool released = false;
  };
  std::mutex mutex;  // clusters run on several host threads
  std::unordered_map<uint64_t, Write> writes;
  std::atomic<bool> any{false};
};

std::shared_ptr<MapProxy> make_map_proxy() { return std::make_shared<MapProxy>(); }

static MapProxy& proxy_of(const Warp& warp) { return *warp.cta->cluster->launch->maps; }

void map_written(Warp& warp, uint64_t address, bool released) {
  MapProxy& proxy = proxy_of(warp);
  std::lock_guard lock(proxy.mutex);
  MapProxy::Write& write = proxy.writes[address];
  const auto writer = static_cast<size_t>(warp.clock_index());
  write = {write.generation + 1, warp.cta->cluster, writer, warp.step++, released};
  proxy.any = true;
}

void release_maps(Warp& warp) {
  MapProxy& proxy = proxy_of(warp);
  if (!proxy.any) return;
  std::lock_guard lock(proxy.mutex);
  for (auto& [address, write] : proxy.writes) {
    if (write.cluster == warp.cta->cluster && knows_step(warp, write.writer, write.sequence)) write.released = true;
  }
}

void acquire_map(Warp& warp, uint64_t address) {
  MapProxy& proxy = proxy_of(warp);
  if (!proxy.any) return;
  std::lock_guard lock(proxy.mutex);
  const auto found = proxy.writes.find(address);
  if (found == proxy.writes.end() || !found->second.released) return;  // it acquires the map as it was before
  warp.cta->acquired_maps[{address, warp.id}] = {found->second.generation, warp.step++};
}

void check_map_fences(const Issue& issue, uint64_t address) {
  Warp& warp = *issue.warp;
  MapProxy& proxy = proxy_of(warp);
  if (!proxy.any) return;
  std::lock_guard lock(proxy.mutex);
  const auto found = proxy.writes.find(address);
  if (found == proxy.writes.end()) return;
  if (!found->second.released)
    return report(
        "missing tensormap fence", issue,
        "the map was modified and no fence.proxy.tensormap::generic.release by a warp that knows of it followed");
  for (const auto& other : warp.cta->warps) {
    const auto acquired = warp.cta->acquired_maps.find({address, other->id});
    if (acquired == warp.cta->acquired_maps.end() || acquired->second.first != found->second.generation) continue;
    if (knows_step(warp, other->clock_index(), acquired->second.second)) return;
  }
  report(
      "missing tensormap fence", issue,
      "the map was modified and released, and this warp has no fence.proxy.tensormap::generic.acquire of its address "
      "after that");
}

}  // namespace hoppersim
