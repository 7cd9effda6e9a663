// Accesses by threads.
#include "races.h"

#include <bit>

#include "core.h"
#include "races_granule.h"

namespace hoppersim {

namespace {

uint16_t bytes_of_lane(const Run& run, uint32_t g, int lane) {
  if (run.share == 0) return bytes_of_granule(g, run.offset, run.size);
  const auto index = static_cast<uint32_t>(std::popcount(run.lanes & ((1u << lane) - 1)));
  return bytes_of_granule(g, run.offset + index * run.share, run.share);
}

// Each lane of the run knows the access, as far as it touches its bytes.
void require_known(const Warp& warp, const Instruction& i, const Run& run, uint32_t g, const Stamp& stamp,
                   const char* verb, bool written) {
  for (uint32_t left = run.lanes; left; left &= left - 1) {
    const int lane = std::countr_zero(left);
    const auto bytes = static_cast<uint16_t>(bytes_of_lane(run, g, lane) & stamp.bytes);
    if (bytes && !knows(warp, lane, stamp, bytes, written)) return race(warp, i, lane, verb, g, bytes, stamp, written);
  }
}

Stamp stamp_of(const Warp& warp, const Instruction& i, const Run& run, uint16_t bytes) {
  Stamp stamp;
  stamp.step = warp.step;
  stamp.lanes = run.lanes;
  stamp.agent = static_cast<uint16_t>(warp.clock_index());
  stamp.bytes = bytes;
  stamp.pc = i.pc;
  stamp.share = run.share;
  stamp.start = std::countr_zero(bytes);
  stamp.strong = i.strong;
  stamp.generic = 1;
  return stamp;
}

// Whether any of these bytes of the granule changed.
bool changed(const Run& run, uint32_t g, uint16_t bytes, const uint8_t* before) {
  if (before == nullptr) return true;
  for (uint32_t left = bytes; left; left &= left - 1) {
    const uint32_t at = g * 16 + std::countr_zero(left);
    if (run.cta->shared.bytes[at] != before[at - run.offset]) return true;
  }
  return false;
}

void check_writing(Warp& warp, const Instruction& i, const Run& run, uint32_t g, uint16_t bytes,
                   const uint8_t* before) {
  SharedMemory& shared = run.cta->shared;
  Granule& granule = shared.granules[g];
  auto passes = [&](const Stamp& old) {
    return !(old.bytes & bytes) || old.step <= warp.clock[old.agent].all || (old.strong && i.strong);
  };
  each_write(shared, granule, [&](Stamp& old) {
    if (!passes(old) && changed(run, g, bytes & old.bytes, before)) require_known(warp, i, run, g, old, "writes", true);
  });
  each_read(shared, granule, [&](Stamp& old) {
    if (!passes(old)) require_known(warp, i, run, g, old, "writes", false);
  });
}

}  // namespace

Run first_run(Warp& warp, Space space, const uint64_t* addresses, uint32_t mask, size_t size) {
  const int first = std::countr_zero(mask);
  Run run{nullptr, 0, static_cast<uint32_t>(size), 1u << first, 0};
  uint64_t address = addresses[first];
  if (!normalise(space, address)) return run;
  Cluster& cluster = *warp.cta->cluster;
  if (address / kRankStride >= cluster.ctas.size()) return run;
  run.cta = cluster.ctas[address / kRankStride].get();
  run.offset = static_cast<uint32_t>(address % kRankStride);
  if (size > 16) return run;
  uint64_t end = addresses[first] + size;
  const uint64_t granule_end = (addresses[first] | 15) + 1;
  for (uint32_t left = mask & (mask - 1); left; left &= left - 1) {
    const int lane = std::countr_zero(left);
    if (addresses[lane] == addresses[first] && run.share == 0) {
      run.lanes |= 1u << lane;
    } else if (addresses[lane] == end && end < granule_end && (run.share || std::has_single_bit(run.lanes))) {
      run.lanes |= 1u << lane;
      run.share = static_cast<uint32_t>(size);
      run.size += run.share;
      end += size;
    } else {
      break;
    }
  }
  return run;
}

void note_read(Warp& warp, const Instruction& i, const Run& run) {
  SharedMemory& shared = run.cta->shared;
  each_granule({run.offset, run.size}, [&](uint32_t g, uint16_t bytes) {
    Granule& granule = shared.granules[g];
    each_write(shared, granule, [&](Stamp& old) {
      if (!(old.bytes & bytes) || old.step <= warp.clock[old.agent].all || (old.strong && i.strong)) return;
      require_known(warp, i, run, g, old, "reads", true);
    });
    add_read(warp, shared, granule, stamp_of(warp, i, run, bytes));
  });
}

void check_write(Warp& warp, const Instruction& i, const Run& run) {
  each_granule({run.offset, run.size},
               [&](uint32_t g, uint16_t bytes) { check_writing(warp, i, run, g, bytes, nullptr); });
}

void note_write(Warp& warp, const Instruction& i, const Run& run, const uint8_t* before) {
  SharedMemory& shared = run.cta->shared;
  each_granule({run.offset, run.size}, [&](uint32_t g, uint16_t bytes) {
    Granule& granule = shared.granules[g];
    check_writing(warp, i, run, g, bytes, before);
    Stamp stamp = stamp_of(warp, i, run, bytes);
    Stamp& own = granule.write;
    // Other lanes have just written the same value there.
    if (own.bytes == bytes && own.share == 0 && run.share == 0 && same_step(own, stamp) &&
        !changed(run, g, bytes, before))
      stamp.lanes |= own.lanes;
    add_write(shared, granule, stamp);
  });
}

void note_reads(Warp& warp, const Instruction& i, Space space, const uint64_t* addresses, uint32_t mask, size_t size) {
  while (mask) {
    const Run run = first_run(warp, space, addresses, mask, size);
    if (run.cta != nullptr) note_read(warp, i, run);
    mask &= ~run.lanes;
  }
}

void note_writes(Warp& warp, const Instruction& i, Space space, const uint64_t* addresses, uint32_t mask, size_t size) {
  while (mask) {
    const Run run = first_run(warp, space, addresses, mask, size);
    if (run.cta != nullptr) note_write(warp, i, run, nullptr);
    mask &= ~run.lanes;
  }
}

void note_source_read(const Issue& issue, Cta& cta, const Range& range) {
  const Run run{&cta, range.offset, range.size, 1u << issue.lane, 0};
  each_granule(range, [&](uint32_t g, uint16_t bytes) {
    add_read(*issue.warp, cta.shared, cta.shared.granules[g], stamp_of(*issue.warp, *issue.instruction, run, bytes));
  });
}

}  // namespace hoppersim
