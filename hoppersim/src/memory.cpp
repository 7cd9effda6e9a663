// Memory accesses with their checks: bounds, alignment, initialisation, proxies, copies in flight.
#include <algorithm>
#include <atomic>
#include <mutex>
#include <shared_mutex>

#include "core.h"
#include "report.h"
#include "tensor_map.h"
#include "tensor_map_proxy.h"

namespace hoppersim {

namespace {

struct GlobalRange {
  uint64_t size = 0;
  bool writable = true;
  int count = 0;  // added as often
};

// Never destroyed: modules that outlive this library's static objects still unregister their variables.
std::shared_mutex& ranges_mutex = *new std::shared_mutex;
std::map<uint64_t, GlobalRange>& ranges = *new std::map<uint64_t, GlobalRange>;
std::atomic<uint64_t> ranges_version{1};

void check_shared(const Warp& warp, const Instruction& i, const Cta& cta, uint64_t offset, size_t size, int lane) {
  const uint32_t begin = cta.cluster->launch->function->shared_begin;
  if (offset >= begin && offset + size <= cta.shared.bytes.size()) return;
  fault("out-of-bounds shared", warp, i,
        std::to_string(size) + " bytes at shared address " + hex(offset) + "; the CTA has " + hex(begin) + " to " +
            hex(cta.shared.bytes.size()),
        lane);
}

void report_mbarrier(const Warp& warp, const Instruction& i, const char* verb, uint64_t offset, int lane) {
  report("mbarrier accessed as memory", warp, i,
         std::string(verb) + " shared address " + hex(offset) + ", where an mbarrier is (at " + hex(offset & ~7ull) +
             "): only mbarrier instructions may touch it between mbarrier.init and mbarrier.inval",
         lane);
}

void check_readable(const Warp& warp, const Instruction& i, const SharedMemory& shared, uint32_t offset, size_t size,
                    int lane) {
  static const std::vector<uint8_t> good(256, SharedMemory::written);
  if (size <= good.size() && std::memcmp(&shared.flags[offset], good.data(), size) == 0) return;
  for (size_t k = 0; k < size; ++k) {
    const uint8_t flags = shared.flags[offset + k];
    if (flags & SharedMemory::mbarrier) return report_mbarrier(warp, i, "reads", offset + k, lane);
    if (flags & SharedMemory::in_flight) {
      return report("read while a copy is in flight", warp, i,
                    "reads shared address " + hex(offset + k) +
                        ", which an asynchronous copy has yet to write: nothing has waited for its completion",
                    lane);
    }
    if (!(flags & SharedMemory::written)) {
      return report("uninitialised shared memory", warp, i,
                    "reads shared address " + hex(offset + k) + ", which nothing has written", lane);
    }
  }
}

void check_writable(const Warp& warp, const Instruction& i, const SharedMemory& shared, uint32_t offset, size_t size,
                    int lane) {
  for (size_t g = offset / 16; g <= (offset + size - 1) / 16; ++g) {
    if (shared.granules[g].async_readers > 0) {
      return report("overwritten while read", warp, i,
                    "writes shared address " + hex(offset) + " while an asynchronous operation still reads it", lane);
    }
  }
}

// The bytes of a global or parameter address, after the checks.
uint8_t* global_bytes(Warp& warp, const Instruction& i, uint64_t address, size_t size, bool write, int lane) {
  const Launch& launch = *warp.cta->cluster->launch;
  const uint64_t parameters = reinterpret_cast<uint64_t>(launch.parameter_base);
  if (!write && address >= parameters && address + size <= parameters + launch.parameters.size())
    return reinterpret_cast<uint8_t*>(address);
  if (launch.options.check_global && !global_ranges().contains(address, size, write)) {
    fault("out-of-bounds global", warp, i,
          (write ? "writes " : "reads ") + std::to_string(size) + " bytes at " + hex(address) +
              ", in no range it may " + (write ? "write" : "read"),
          lane);
  }
  return reinterpret_cast<uint8_t*>(address);
}

uint8_t* local_bytes(Warp& warp, const Instruction& i, uint64_t address, size_t size, int lane) {
  const uint64_t bytes = warp.cta->cluster->launch->function->local_bytes;
  if (warp.local.empty()) warp.local.assign(kLanes, std::vector<uint8_t>(bytes));
  if (address + size > bytes || address + size < address) {
    fault("out-of-bounds local", warp, i,
          std::to_string(size) + " bytes at local address " + hex(address) + " of " + hex(bytes), lane);
  }
  return warp.local[lane].data() + address;
}

// Splits generic addresses into their windows.
Space window(Space space, uint64_t& address) {
  if (space != Space::generic) return space;
  if (address >= kLocalWindow && address < kLocalWindow + (1ull << 32)) {
    address -= kLocalWindow;
    return Space::local;
  }
  if (address >= kSharedWindow && address < kSharedWindow + (1ull << 32)) {
    address -= kSharedWindow;
    return Space::shared;
  }
  return Space::global;
}

void check_alignment(const Warp& warp, const Instruction& i, uint64_t address, size_t size, int lane) {
  const size_t align = std::min<size_t>(size, 16);
  if (address & (align - 1)) fault("misaligned", warp, i, std::to_string(size) + " bytes at " + hex(address), lane);
}

// Whether a store puts the beginning of a tensor map into memory: its magic number tells.
bool begins_map(const void* data) {
  uint32_t first;
  std::memcpy(&first, data, 4);
  return first == static_cast<uint32_t>(kTensorMapMagic);
}

}  // namespace

void SharedMemory::resize(size_t size) {
  bytes.assign(size, 0xa5);
  flags.assign(size, 0);
  granules.assign((size + 15) / 16, {});
}

void SharedMemory::clear(size_t begin, size_t end) {
  std::fill(bytes.data() + begin, bytes.data() + end, 0);
  std::fill(flags.data() + begin, flags.data() + end, written);
}

void GlobalRanges::add(const void* begin, size_t size, bool writable) {
  std::unique_lock lock(ranges_mutex);
  GlobalRange& range = ranges[reinterpret_cast<uint64_t>(begin)];
  range.size = std::max<uint64_t>(range.size, size);
  range.writable = range.count == 0 ? writable : range.writable || writable;
  ++range.count;
  ++ranges_version;
}

void GlobalRanges::remove(const void* begin) {
  std::unique_lock lock(ranges_mutex);
  const auto found = ranges.find(reinterpret_cast<uint64_t>(begin));
  if (found != ranges.end() && --found->second.count <= 0) ranges.erase(found);
  ++ranges_version;
}

bool GlobalRanges::contains(uint64_t address, size_t size, bool write) const {
  struct Cache {
    uint64_t version = 0, begin = 0, end = 0;
    bool writable = false;
  };
  thread_local Cache cache[4];
  thread_local unsigned next = 0;
  const uint64_t version = ranges_version.load(std::memory_order_acquire);
  for (const Cache& c : cache) {
    if (c.version == version && address >= c.begin && address + size <= c.end && (c.writable || !write)) return true;
  }
  std::shared_lock lock(ranges_mutex);
  auto range = ranges.upper_bound(address);
  for (int steps = 0; range != ranges.begin() && steps < 256; ++steps) {  // ranges may be nested
    --range;
    const uint64_t end = range->first + range->second.size;
    if (address + size > end || address + size < address || (write && !range->second.writable)) continue;
    cache[next++ % 4] = {version, range->first, end, range->second.writable};
    return true;
  }
  return false;
}

GlobalRanges& global_ranges() {
  static GlobalRanges instance;
  return instance;
}

SharedPlace shared_place(Warp& warp, const Instruction& i, uint64_t address, size_t size, Space space) {
  uint64_t offset = address;
  if (space == Space::generic && window(space, offset) != Space::shared) {
    fault("out-of-bounds shared", warp, i, "generic address " + hex(address) + " is not in shared memory");
  }
  const uint64_t rank = offset / kRankStride;
  Cluster& cluster = *warp.cta->cluster;
  if (rank >= cluster.ctas.size())
    fault("out-of-bounds shared", warp, i, "shared address " + hex(offset) + " names no CTA of the cluster");
  Cta& cta = *cluster.ctas[rank];
  offset %= kRankStride;
  check_shared(warp, i, cta, offset, size, -1);
  return {&cta, static_cast<uint32_t>(offset)};
}

void read_memory(Warp& warp, const Instruction& i, Space space, uint64_t address, size_t size, void* data, int lane) {
  space = window(space, address);
  check_alignment(warp, i, address, size, lane);
  if (space == Space::shared) {
    const SharedPlace place = shared_place(warp, i, address, size, space);
    if (place.cta != warp.cta) access_remote(warp, i, *place.cta, lane);
    check_readable(warp, i, place.cta->shared, place.offset, size, lane);
    std::memcpy(data, &place.cta->shared.bytes[place.offset], size);
  } else if (space == Space::local) {
    std::memcpy(data, local_bytes(warp, i, address, size, lane), size);
  } else if (space == Space::param) {
    const Launch& launch = *warp.cta->cluster->launch;
    if (address + size > launch.parameters.size())
      fault("out-of-bounds param", warp, i, "offset " + hex(address), lane);
    std::memcpy(data, launch.parameter_base + address, size);
  } else {
    std::memcpy(data, global_bytes(warp, i, address, size, false, lane), size);
  }
}

void write_memory(Warp& warp, const Instruction& i, Space space, uint64_t address, size_t size, const void* data,
                  int lane) {
  space = window(space, address);
  check_alignment(warp, i, address, size, lane);
  if (space == Space::shared) {
    const SharedPlace place = shared_place(warp, i, address, size, space);
    if (place.cta != warp.cta) access_remote(warp, i, *place.cta, lane);
    SharedMemory& shared = place.cta->shared;
    check_writable(warp, i, shared, place.offset, size, lane);
    uint8_t any = 0;
    for (size_t k = 0; k < size; ++k) any |= shared.flags[place.offset + k];
    if (any & SharedMemory::in_flight)
      report("overwritten while a copy is in flight", warp, i,
             "writes shared address " + hex(address) + ", which an asynchronous copy is writing", lane);
    if (any & SharedMemory::mbarrier) {
      report_mbarrier(warp, i, "writes", place.offset, lane);
      for (size_t k = 0; k < size; ++k) shared.flags[place.offset + k] |= SharedMemory::written;
    } else {
      std::memset(&shared.flags[place.offset], SharedMemory::written, size);
    }
    std::memcpy(&shared.bytes[place.offset], data, size);
  } else if (space == Space::local) {
    std::memcpy(local_bytes(warp, i, address, size, lane), data, size);
  } else if (space == Space::param || space == Space::constant) {
    fault("out-of-bounds global", warp, i, "writes to memory that cannot be written", lane);
  } else {
    uint8_t* to = global_bytes(warp, i, address, size, true, lane);
    if (std::memcmp(to, data, size) != 0) warp.changed |= 1u << lane;
    std::memcpy(to, data, size);
    if (size >= 4 && address % 64 == 0 && begins_map(data)) map_written(warp, address, false);
  }
}

void async_read_shared(Warp& warp, const Instruction& i, Cta& cta, uint32_t offset, size_t size, void* data) {
  if (size == 0) return;
  check_shared(warp, i, cta, offset, size, -1);
  check_readable(warp, i, cta.shared, offset, size, -1);
  if (data != nullptr) std::memcpy(data, &cta.shared.bytes[offset], size);
}

void async_write_shared(Warp& warp, const Instruction& i, Cta& cta, uint32_t offset, size_t size, const void* data) {
  if (size == 0) return;
  check_shared(warp, i, cta, offset, size, -1);
  check_writable(warp, i, cta.shared, offset, size, -1);
  std::memcpy(&cta.shared.bytes[offset], data, size);
  for (size_t k = 0; k < size; ++k) cta.shared.flags[offset + k] |= SharedMemory::written;
}

// Accesses of 8 and 16 bytes a lane go in two and four phases of 16 and 8 lanes; a phase takes as many wavefronts as
// the bank with the most distinct words.
void count_shared(Counters& counters, const uint32_t* offsets, uint32_t mask, int bytes_per_lane) {
  ++counters.shared_accesses;
  const int words = std::max(1, bytes_per_lane / 4), lanes = kLanes / words;
  for (int phase = 0; phase < words; ++phase) {
    uint32_t seen[32][32];
    int depth[32] = {}, worst = 0;
    for (int lane = phase * lanes; lane < (phase + 1) * lanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      for (int w = 0; w < words; ++w) {
        const uint32_t word = offsets[lane] / 4 + w, bank = word % 32;
        if (std::find(seen[bank], seen[bank] + depth[bank], word) != seen[bank] + depth[bank]) continue;
        seen[bank][depth[bank]++] = word;
        worst = std::max(worst, depth[bank]);
      }
    }
    counters.shared_wavefronts += worst;
    counters.shared_ideal_wavefronts += worst > 0;
  }
}

void count_global(Counters& counters, const uint64_t* addresses, uint32_t mask, int bytes_per_lane, bool write) {
  uint64_t sectors[2 * kLanes];
  int count = 0, active = 0;
  bool ordered = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    ++active;
    const uint64_t last = (addresses[lane] + bytes_per_lane - 1) / 32;
    for (uint64_t s = addresses[lane] / 32; s <= last; ++s) {
      if (count > 0 && sectors[count - 1] == s) continue;
      ordered &= count == 0 || sectors[count - 1] < s;
      sectors[count++] = s;
    }
  }
  if (!ordered) {
    std::sort(sectors, sectors + count);
    count = static_cast<int>(std::unique(sectors, sectors + count) - sectors);
  }
  (write ? counters.global_write_sectors : counters.global_read_sectors) += count;
  (write ? counters.global_write_bytes : counters.global_read_bytes) += uint64_t(active) * bytes_per_lane;
}

}  // namespace hoppersim
