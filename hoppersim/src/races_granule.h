// What races*.cpp share: the stamps of a granule of shared memory, and how a race is told.
#pragma once

#include "races.h"

namespace hoppersim {

using Granule = SharedMemory::Granule;

// The bytes of granule g that lie in the range, as a mask.
inline uint16_t bytes_of_granule(uint32_t g, uint32_t offset, uint32_t size) {
  const uint32_t first = std::max(offset, g * 16) - g * 16, last = std::min(offset + size, g * 16 + 16) - g * 16;
  return static_cast<uint16_t>(((1u << last) - 1) & ~((1u << first) - 1));
}

// body(granule, its bytes) for each granule of the range
template <class Body>
void each_granule(const Range& range, Body body) {
  if (range.size == 0) return;
  const uint32_t last = (range.offset + range.size - 1) / 16;
  for (uint32_t g = range.offset / 16; g <= last; ++g) {
    const bool inside = g * 16 >= range.offset && g * 16 + 16 <= range.offset + range.size;
    body(g, inside ? uint16_t{0xffff} : bytes_of_granule(g, range.offset, range.size));
  }
}

// body(stamp) for each stamp of a granule
template <class Body>
void each_write(SharedMemory& shared, Granule& granule, Body body) {
  body(granule.write);
  if (granule.more == 0) return;
  for (Stamp& stamp : shared.more[granule.more - 1].writes) body(stamp);
}
template <class Body>
void each_read(SharedMemory& shared, Granule& granule, Body body) {
  body(granule.reads[0]);
  body(granule.reads[1]);
  if (granule.more == 0) return;
  for (Stamp& stamp : shared.more[granule.more - 1].reads) body(stamp);
}

// Adds an access. A read replaces reads that happen before it, a write all that was remembered of its bytes.
void add_read(const Warp& warp, SharedMemory& shared, Granule& granule, const Stamp& stamp);
void add_write(SharedMemory& shared, Granule& granule, const Stamp& stamp);
bool same_step(const Stamp& a, const Stamp& b);

// "CTA (0, 0, 0), warp 1, lane 0 at ptx line 7: st.shared…"
std::string name_of(const Cluster& cluster, const Stamp& stamp, uint16_t bytes);
std::string place_name(uint32_t g, uint16_t bytes);
void race(const Warp& warp, const Instruction& i, int lane, const char* verb, uint32_t g, uint16_t bytes,
          const Stamp& stamp, bool written);

}  // namespace hoppersim
