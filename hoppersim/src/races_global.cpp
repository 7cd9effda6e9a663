#include "races_global.h"

#include <algorithm>
#include <array>
#include <bit>
#include <mutex>
#include <unordered_map>

#include "interpreter.h"
#include "report.h"

namespace hoppersim {

namespace {

constexpr size_t kShards = 64, kFlags = 256;
constexpr uint64_t kPage = 4096;
constexpr uint32_t kUnderWay = ~0u;  // epoch of what a bulk store writes

struct GlobalStamp {
  uint32_t cluster = 0, epoch = 0, pc = 0;
  uint16_t bytes = 0;  // of the granule; 0: no access
};

// 16 bytes. What finds no room is forgotten.
struct GlobalGranule {
  std::array<GlobalStamp, 2> writes, reads;
};

struct Shard {
  std::mutex mutex;
  std::unordered_map<uint64_t, std::unique_ptr<std::array<GlobalGranule, kPage / 16>>> pages;
};

bool is_global(Space space, uint64_t address) {
  return space == Space::global || (space == Space::generic && address < kSharedWindow);
}

size_t flag_of(uint64_t address) { return (address >> 4) * 0x9e3779b97f4a7c15ull >> 56; }

void merge(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  into.resize(std::max(into.size(), from.size()));
  for (size_t k = 0; k < from.size(); ++k) into[k] = std::max(into[k], from[k]);
}

std::string name_of_cluster(const Launch& launch, uint64_t index) {
  const Dim3 grid = launch.grid, size = launch.cluster;
  const uint64_t nx = grid.x / size.x, ny = grid.y / size.y;
  const std::string first = "CTA (" + std::to_string(index % nx * size.x) + ", " +
                            std::to_string(index / nx % ny * size.y) + ", " +
                            std::to_string(index / (nx * ny) * size.z) + ")";
  return size.x * size.y * size.z > 1 ? "the cluster of " + first : first;
}

// Adds an access of the cluster; `own` are those of its sort.
void add(std::array<GlobalStamp, 2>& own, const GlobalStamp& stamp, const ClusterOrder& order) {
  GlobalStamp* room = nullptr;
  for (GlobalStamp& old : own) {
    const bool mine = old.cluster == stamp.cluster;
    if (mine && old.bytes && old.epoch == stamp.epoch) {
      old.bytes |= stamp.bytes;
      old.pc = stamp.pc;
      return;
    }
    // whatever comes after this access comes after that one
    const bool before = mine || old.epoch <= order.known[old.cluster];
    if (old.bytes == 0 || (before && !(old.bytes & ~stamp.bytes))) room = &old;
  }
  if (room != nullptr) *room = stamp;
}

}  // namespace

struct GlobalOrder {
  std::mutex mutex;  // of the flags
  std::array<std::vector<uint32_t>, kFlags> flags;
  std::array<Shard, kShards> shards;
};

std::shared_ptr<GlobalOrder> make_global_order(const Launch& launch) {
  const uint64_t clusters = cluster_count(launch);
  const Function& f = *launch.function;
  const bool needed = clusters > 1 || f.stores_bulk || f.loads_read_only;
  return needed && clusters <= kOrderedClusters ? std::make_shared<GlobalOrder>() : nullptr;
}

std::shared_ptr<ClusterOrder> make_cluster_order(const Launch& launch, uint64_t index) {
  if (!launch.global_order) return nullptr;
  const std::vector<uint32_t> nothing(cluster_count(launch));
  return std::make_shared<ClusterOrder>(ClusterOrder{static_cast<uint32_t>(index), 1, nothing});
}

void release_global(Warp& warp, Space space, const uint64_t* addresses, uint32_t mask) {
  Cluster& cluster = *warp.cta->cluster;
  if (!cluster.global_order) return;
  ClusterOrder& own = *cluster.global_order;
  bool any = false;
  std::lock_guard lock(cluster.launch->global_order->mutex);
  for (uint32_t left = mask; left; left &= left - 1) {
    const uint64_t address = addresses[std::countr_zero(left)];
    if (!is_global(space, address)) continue;
    std::vector<uint32_t>& flag = cluster.launch->global_order->flags[flag_of(address)];
    merge(flag, own.known);
    flag[own.index] = own.epoch;
    any = true;
  }
  own.epoch += any;
}

void acquire_global(Warp& warp, Space space, const uint64_t* addresses, uint32_t mask) {
  Cluster& cluster = *warp.cta->cluster;
  if (!cluster.global_order) return;
  std::lock_guard lock(cluster.launch->global_order->mutex);
  for (uint32_t left = mask; left; left &= left - 1) {
    const uint64_t address = addresses[std::countr_zero(left)];
    if (is_global(space, address))
      merge(cluster.global_order->known, cluster.launch->global_order->flags[flag_of(address)]);
  }
}

namespace {

// Reports an access that nothing orders behind those that the granule remembers.
void check_granule(Warp& warp, const Instruction& i, const GlobalGranule& granule, const GlobalStamp& stamp,
                   uint64_t address, int lane, bool write) {
  const Launch& launch = *warp.cta->cluster->launch;
  const ClusterOrder& own = *warp.cta->cluster->global_order;
  auto check = [&](const GlobalStamp& old, const char* what) {
    if (old.bytes & stamp.bytes && (i.read_only || launch.function->code[old.pc].read_only))
      return report("read-only memory written", warp, i,
                    std::string(write ? "writes" : "reads") + " global address " + hex(address) + ", which " +
                        name_of_cluster(launch, old.cluster) + " has " + what + " at " +
                        position(*launch.function, launch.function->code[old.pc]),
                    lane);
    const bool under_way = old.epoch == kUnderWay,
               known = old.cluster == own.index || old.epoch <= own.known[old.cluster];
    if (!(old.bytes & stamp.bytes) || (known && !under_way)) return;
    report("race in global memory", warp, i,
           std::string(write ? "writes" : "reads") + " global address " + hex(address) + ", which " +
               (under_way ? "is being " : "was ") + what + " by " + name_of_cluster(launch, old.cluster) + " at " +
               position(*launch.function, launch.function->code[old.pc]) +
               (under_way ? "; its lane has not waited for its group (wait_group without .read)"
                          : "; nothing orders the two: an atomic or a release after that and an acquire of its "
                            "address before this would, or two launches"),
           lane);
  };
  for (const GlobalStamp& old : granule.writes) check(old, "written");
  if (!write) return;
  for (const GlobalStamp& old : granule.reads) check(old, "read");
}

void note_granule(Warp& warp, const Instruction& i, GlobalGranule& granule, const GlobalStamp& stamp, uint64_t address,
                  int lane, bool write) {
  const ClusterOrder& own = *warp.cta->cluster->global_order;
  check_granule(warp, i, granule, stamp, address, lane, write);
  if (!write) return add(granule.reads, stamp, own);
  for (GlobalStamp& old : granule.reads) old.bytes &= ~stamp.bytes;
  for (GlobalStamp& old : granule.writes) {
    if (old.cluster != stamp.cluster || old.epoch != stamp.epoch) old.bytes &= ~stamp.bytes;
  }
  add(granule.writes, stamp, own);
}

// body(granule, its bytes, address) for all that [begin, end) touches, under the locks of their pages.
class Granules {
 public:
  explicit Granules(const Launch& launch) : order_(*launch.global_order) {}

  template <class Body>
  void each(uint64_t begin, uint64_t end, Body body) {
    for (uint64_t at = begin; at < end; at = (at | 15) + 1) {
      if (at / kPage != page_) turn_to(at / kPage);
      const uint64_t last = std::min(end, (at | 15) + 1) - (at & ~15ull);
      body((*granules_)[at % kPage / 16], static_cast<uint16_t>((1u << last) - (1u << at % 16)), at);
    }
  }

 private:
  void turn_to(uint64_t page) {
    page_ = page;
    if (lock_) lock_.unlock();
    Shard& shard = order_.shards[page % kShards];
    lock_ = std::unique_lock(shard.mutex);
    auto& place = shard.pages[page];
    if (!place) place = std::make_unique<std::array<GlobalGranule, kPage / 16>>();
    granules_ = place.get();
  }

  GlobalOrder& order_;
  std::unique_lock<std::mutex> lock_;
  uint64_t page_ = ~0ull;
  std::array<GlobalGranule, kPage / 16>* granules_ = nullptr;
};

}  // namespace

void note_global(Warp& warp, const Instruction& i, Space space, const uint64_t* addresses, uint32_t mask, size_t size,
                 bool write) {
  Cluster& cluster = *warp.cta->cluster;
  if (!cluster.global_order || i.strong) return;
  GlobalStamp stamp{cluster.global_order->index, cluster.global_order->epoch, i.pc, 0};
  Granules granules(*cluster.launch);
  while (mask) {
    const int lane = std::countr_zero(mask);
    const uint64_t begin = addresses[lane];
    mask &= mask - 1;
    if (!is_global(space, begin)) continue;
    uint64_t end = begin + size;  // of the lanes that follow one another in memory
    for (int next = lane + 1; next < kLanes && mask >> next & 1 && addresses[next] == end; ++next) {
      mask &= mask - 1;
      end += size;
    }
    granules.each(begin, end, [&](GlobalGranule& granule, uint16_t bytes, uint64_t at) {
      stamp.bytes = bytes;
      note_granule(warp, i, granule, stamp, at, lane + static_cast<int>((at - begin) / size), write);
    });
  }
}

void check_global_load(const Issue& issue, uint64_t address, uint64_t size) {
  const Cluster& cluster = *issue.warp->cta->cluster;
  if (!cluster.global_order) return;
  GlobalStamp stamp;
  Granules(*cluster.launch).each(address, address + size, [&](GlobalGranule& granule, uint16_t bytes, uint64_t at) {
    stamp.bytes = bytes;
    check_granule(*issue.warp, *issue.instruction, granule, stamp, at, issue.lane, false);
  });
}

void begin_global_store(const Issue& issue, uint64_t address, uint64_t size) {
  const Cluster& cluster = *issue.warp->cta->cluster;
  if (!cluster.global_order) return;
  GlobalStamp stamp{cluster.global_order->index, kUnderWay, issue.instruction->pc, 0};
  Granules(*cluster.launch).each(address, address + size, [&](GlobalGranule& granule, uint16_t bytes, uint64_t at) {
    stamp.bytes = bytes;
    note_granule(*issue.warp, *issue.instruction, granule, stamp, at, issue.lane, true);
  });
}

void end_global_store(Warp& warp, uint64_t address, uint64_t size) {
  const ClusterOrder& own = *warp.cta->cluster->global_order;
  Granules(*warp.cta->cluster->launch)
      .each(address, address + size, [&](GlobalGranule& granule, uint16_t bytes, uint64_t) {
        for (GlobalStamp& old : granule.writes)
          if (old.cluster == own.index && old.epoch == kUnderWay && old.bytes & bytes) old.epoch = own.epoch;
      });
}

}  // namespace hoppersim
