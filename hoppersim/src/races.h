// Races: accesses to shared memory that nothing orders, and what the async proxy touches without a proxy fence.
//
// Each granule of 16 bytes remembers the last write of each byte and the reads since (Stamp, machine.h), with the lanes
// that made them. An access is compared with those that it conflicts with: each must happen before it (order.h).
#pragma once

#include "async.h"
#include "order.h"

namespace hoppersim {

// Lanes of one instruction that access the same bytes of a granule, or neighbouring ones in the order of the lanes.
struct Run {
  Cta* cta = nullptr;             // nullptr: not in shared memory, one lane
  uint32_t offset = 0, size = 0;  // all its bytes
  uint32_t lanes = 0;
  uint32_t share = 0;  // bytes of each lane; 0: every lane has all
};
// The run that begins at the lowest lane of `mask`; `size`: bytes per lane.
Run first_run(Warp& warp, Space space, const uint64_t* addresses, uint32_t mask, size_t size);

// Accesses by threads. They report races, then remember the access. `before`: what the bytes of a run of writes were;
// writes of the value that was there already do not race with other writes. nullptr: any write may race.
void note_read(Warp& warp, const Instruction& i, const Run& run);
void note_write(Warp& warp, const Instruction& i, const Run& run, const uint8_t* before);
void note_reads(Warp& warp, const Instruction& i, Space space, const uint64_t* addresses, uint32_t mask, size_t size);
void note_writes(Warp& warp, const Instruction& i, Space space, const uint64_t* addresses, uint32_t mask, size_t size);
void check_write(Warp& warp, const Instruction& i, const Run& run);  // reports only

// Accesses by the async proxy; lane -1: the whole warp issued it. They end with a step of an agent.
struct Completion {
  size_t agent = 0;
  uint32_t step = 0;
};
Completion completion_of(Cta& cta, uint32_t offset, Mbarrier& barrier, uint32_t phase);
void check_async_read(const Issue& issue, Cta& cta, const Range& range);
void note_async_read(const Issue& issue, Cta& cta, const Range& range, Completion completion);
void note_async_write(const Issue& issue, Cta& cta, const Range& range, Completion completion, LoadKind kind);
// Bytes of a cp.async.
void note_thread_copy(const Issue& issue, Cta& cta, const Range& range, Completion completion);
// The lane has waited for the read of the source of its bulk store.
void note_source_read(const Issue& issue, Cta& cta, const Range& range);

// Global memory, in kernels that load with the copy engine.
void note_global_writes(Warp& warp, const Instruction& i, Space space, const uint64_t* addresses, uint32_t mask,
                        size_t size);
void check_global_fence(const Issue& issue, uint64_t address, uint64_t size);

}  // namespace hoppersim
