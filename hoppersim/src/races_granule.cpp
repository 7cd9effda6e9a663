#include "races_granule.h"

#include <algorithm>
#include <bit>
#include <cstdio>

#include "report.h"

namespace hoppersim {

// ---- Reports
std::string name_of(const Cluster& cluster, const Stamp& stamp, uint16_t bytes) {
  const size_t warps = cluster.ctas[0]->warps.size();
  const bool of_warp = stamp.agent < cluster.ctas.size() * warps;
  const size_t index = of_warp ? stamp.agent : stamp.lanes / kLanes;
  const uint32_t lanes = lanes_of(stamp, bytes);
  const int lane = of_warp ? std::countr_zero(lanes) : static_cast<int>(stamp.lanes % kLanes);
  const Function& function = *cluster.launch->function;
  return name_of_warp(cluster, index) + ", lane " + std::to_string(lane) + " at " +
         position(function, function.code[stamp.pc]);
}

std::string place_name(uint32_t g, uint16_t bytes) {
  char text[40];
  std::snprintf(text, sizeof text, "shared address 0x%x", g * 16 + std::countr_zero(bytes));
  return text;
}

static const char* remedy(const Warp& warp, const Stamp& stamp) {
  const size_t warps = warp.cta->cluster->ctas.size() * warp.cta->warps.size();
  if (stamp.agent == warp.clock_index()) return "a __syncwarp (bar.warp.sync) between the two would";
  if (stamp.agent < warps) return "a barrier between the two would, or an arrival after that and a wait before this";
  return "a wait for its completion by this thread, or by one that this has synchronised with since, would";
}

void race(const Warp& warp, const Instruction& i, int lane, const char* verb, uint32_t g, uint16_t bytes,
          const Stamp& stamp, bool written) {
  const std::string text = std::string(verb) + " " + place_name(g, bytes & stamp.bytes) + ", which was " +
                           (written ? "written" : "read") + " by " + name_of(*warp.cta->cluster, stamp, bytes) +
                           "; nothing orders the two: " + remedy(warp, stamp);
  if (stamp.agent == warp.clock_index()) return report("race within a warp", warp, i, text, lane);
  report("race in shared memory", warp, i, text, lane);
}

// ---- Adding a stamp
namespace {

constexpr size_t kMore = 32;  // stamps of a granule beyond its own; the oldest are forgotten

void keep(SharedMemory& shared, Granule& granule, const Stamp& stamp, bool write) {
  if (granule.more == 0) {
    shared.more.emplace_back();
    granule.more = static_cast<uint32_t>(shared.more.size());
  }
  auto& list = write ? shared.more[granule.more - 1].writes : shared.more[granule.more - 1].reads;
  std::erase_if(list, [](const Stamp& s) { return s.bytes == 0; });
  if (list.size() >= kMore) list.erase(list.begin());
  list.push_back(stamp);
}

// Joins an access of the same step; false: then the lanes could no longer be told.
bool join(Stamp& into, const Stamp& from) {
  auto single = [](const Stamp& s) { return s.share != kMixed && (s.share || std::has_single_bit(s.lanes)); };
  auto width = [](const Stamp& s) { return s.share ? s.share : static_cast<uint32_t>(std::popcount(s.bytes)); };
  const bool same_bytes = into.bytes == from.bytes && into.share == from.share && into.start == from.start;
  if (into.share == kMixed || (same_bytes && (into.share == 0 || into.lanes == from.lanes))) {
    into.bytes |= from.bytes;
  } else if (into.lanes == from.lanes && into.share == 0 && from.share == 0 && single(into)) {
    into.bytes |= from.bytes;
  } else if (single(into) && single(from) && width(into) == width(from) &&
             into.start + static_cast<uint32_t>(std::popcount(into.bytes)) == from.start &&
             static_cast<int>(std::bit_width(into.lanes)) <= std::countr_zero(from.lanes)) {
    into.bytes |= from.bytes;
    into.share = width(from);
  } else {
    return false;
  }
  into.lanes |= from.lanes;
  into.pc = from.pc;
  return true;
}

constexpr int kApart = 8;  // stamps of one step in a granule; then the lanes are no longer told

void mix(Stamp& into, const Stamp& from) {
  into.bytes |= from.bytes;
  into.lanes |= from.lanes;
  into.share = kMixed;
}

}  // namespace

bool same_step(const Stamp& a, const Stamp& b) {
  return a.step == b.step && a.agent == b.agent && a.strong == b.strong && a.generic == b.generic;
}

void add_read(const Warp& warp, SharedMemory& shared, Granule& granule, const Stamp& stamp) {
  Stamp *room = nullptr, *last = nullptr;
  bool done = false;
  int apart = 0;
  each_read(shared, granule, [&](Stamp& old) {
    if (done) return;
    if (old.bytes == 0) {
      if (room == nullptr) room = &old;
    } else if (same_step(old, stamp)) {
      done = join(old, stamp);
      last = &old;
      ++apart;
    } else if ((old.bytes & ~stamp.bytes) == 0 &&
               (old.step <= warp.clock[old.agent].all || (old.agent == stamp.agent && !(old.lanes & ~stamp.lanes)))) {
      if (room != nullptr) room->bytes = 0;
      room = &old;  // whatever is ordered after this read is ordered after that one
    }
  });
  if (done) return;
  if (apart >= kApart) {
    mix(*last, stamp);
  } else if (room != nullptr) {
    *room = stamp;
  } else {
    keep(shared, granule, stamp, false);
  }
}

void add_write(SharedMemory& shared, Granule& granule, const Stamp& stamp) {
  if (stamp.bytes == 0xffff && granule.more == 0) {
    granule.write = stamp;
    granule.reads[0].bytes = granule.reads[1].bytes = 0;
    return;
  }
  const auto others = static_cast<uint16_t>(~stamp.bytes);
  each_read(shared, granule, [&](Stamp& old) { old.bytes &= others; });
  each_write(shared, granule, [&](Stamp& old) { old.bytes &= others; });
  bool done = false;
  int apart = 0;
  each_write(shared, granule, [&](Stamp& old) {
    if (done || old.bytes == 0 || !same_step(old, stamp)) return;
    done = join(old, stamp);
    ++apart;
  });
  if (done) return;
  Stamp& own = granule.write;
  if (apart >= kApart && same_step(own, stamp)) return mix(own, stamp);
  if (own.bytes != 0) keep(shared, granule, own, true);
  own = stamp;
}

}  // namespace hoppersim
