// cp.async (not bulk): each lane copies 4, 8 or 16 bytes; done by the lane itself, so the data are ordinary writes of
// it.
#include <algorithm>
#include <bit>

#include "races.h"

namespace hoppersim {
namespace {

Range destination_of(const ThreadCopy& copy) { return {copy.destination, copy.size}; }

uint64_t shared_address(const Cta& cta, uint32_t offset) {
  return static_cast<uint64_t>(cta.rank) * kRankStride + offset;
}

// The write of a lane that has waited, or has begun it.
void note(const ThreadCopy& copy, bool only_check) {
  Warp& warp = *copy.issue.warp;
  const Run run{warp.cta, copy.destination, copy.size, 1u << copy.issue.lane, 0};
  if (only_check) return check_write(warp, *copy.issue.instruction, run);
  note_write(warp, *copy.issue.instruction, run, nullptr);
}

void perform(const ThreadCopy& copy) {
  Warp& warp = *copy.issue.warp;
  uint8_t data[16] = {};
  check_global(copy.issue, copy.source, copy.source_size, false);
  std::memcpy(data, reinterpret_cast<const void*>(copy.source), copy.source_size);
  set_in_flight(*warp.cta, destination_of(copy), false);
  write_memory(warp, *copy.issue.instruction, Space::shared, shared_address(*warp.cta, copy.destination), copy.size,
               data, copy.issue.lane);
}

bool is_late(const Warp& warp) { return warp.cta->cluster->launch->options.timing == Timing::late; }

// src-size or ignore-src, whichever the fourth operand is; a cache policy is a 64-bit register.
uint32_t source_size(const Warp& warp, const Instruction& i, uint32_t size, int lane) {
  if (i.operands.size() < 4) return size;
  const Operand& extra = i.operands[3];
  if (extra.kind == Operand::Kind::predicate) return operand_value(warp, extra, lane) ? 0 : size;
  if (extra.kind == Operand::Kind::reg && bits_of(extra.type) == 64) return size;
  const auto bytes = static_cast<uint32_t>(operand_value(warp, extra, lane));
  if (bytes > size)
    fault("misaligned bulk copy", warp, i, "src-size " + std::to_string(bytes) + " is above cp-size", lane);
  return bytes;
}

bool copy(Warp& warp, const Instruction& i, uint32_t mask) {
  WarpCopies& copies = copies_of(warp);
  uint64_t sources[kLanes] = {};
  uint32_t offsets[kLanes] = {}, reading = 0;
  const auto size = static_cast<uint32_t>(i.operands[2].immediate);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Issue issue{&warp, &i, lane};
    const SharedPlace place = place_of(warp, i, i.operands[0], size, true, lane);
    const uint64_t source = address_of(warp, i.operands[1], lane);
    const uint32_t bytes = source_size(warp, i, size, lane);
    if (place.offset % size) fault("misaligned shared", issue, "cp.async of " + std::to_string(size) + " bytes");
    if (source % size) fault("misaligned global", issue, "cp.async of " + std::to_string(size) + " bytes");
    check_global(issue, source, bytes, false);
    ThreadCopy item{issue, source, place.offset, size, bytes};
    uint8_t any = 0;
    for (uint32_t b = 0; b < size; ++b) any |= warp.cta->shared.flags[place.offset + b];
    if (any & SharedMemory::in_flight)
      report("overwritten while a copy is in flight", issue,
             "another copy to the same shared memory has not been waited for");
    note(item, true);
    if (!is_late(warp)) perform(item);
    set_in_flight(*warp.cta, destination_of(item), true);
    copies.thread_copies.push_back(item);
    sources[lane] = source;
    offsets[lane] = place.offset;
    if (bytes) reading |= 1u << lane;
  }
  Counters& counters = warp.cta->cluster->counters;
  count_global(counters, sources, reading, static_cast<int>(size), false);
  count_shared(counters, offsets, mask, static_cast<int>(size));
  return true;
}

void finish(const ThreadCopy& item) {
  if (is_late(*item.issue.warp)) perform(item);
  set_in_flight(*item.issue.warp->cta, destination_of(item), false);
}

bool commit(Warp& warp, const Instruction&, uint32_t mask) {
  WarpCopies& copies = copies_of(warp);
  for (ThreadCopy& item : copies.thread_copies)
    if (item.group < 0 && mask >> item.issue.lane & 1) item.group = copies.thread_groups[item.issue.lane];
  for (int lane = 0; lane < kLanes; ++lane) copies.thread_groups[lane] += mask >> lane & 1;
  return true;
}

bool wait(Warp& warp, const Instruction& i, uint32_t mask) {
  WarpCopies& copies = copies_of(warp);
  const bool all = i.data[0];
  const int64_t allowed = all ? 0 : static_cast<int64_t>(i.operands[0].immediate);
  std::vector<ThreadCopy> left, done;
  for (const ThreadCopy& item : copies.thread_copies) {
    const int lane = item.issue.lane;
    const bool covered = all || (item.group >= 0 && item.group < copies.thread_groups[lane] - allowed);
    (covered && mask >> lane & 1 ? done : left).push_back(item);
  }
  copies.thread_copies = std::move(left);
  for (const ThreadCopy& item : done) {
    finish(item);
    note(item, false);
  }
  return true;
}

// The arrival happens when the lane's copies so far are complete. Without .noinc it is not one of the expected
// arrivals.
bool arrive_after(Warp& warp, const Instruction& i, uint32_t mask) {
  WarpCopies& copies = copies_of(warp);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Issue issue{&warp, &i, lane};
    const SharedPlace place = place_of(warp, i, i.operands[0], 8, true, lane);
    Mbarrier& barrier = barrier_at(issue, *place.cta, place.offset);
    check_initialised(issue, *place.cta, place.offset, false);
    if (!i.data[0]) ++barrier.pending;
    const Completion completion = completion_of(*place.cta, place.offset, barrier, barrier.phase);
    Clock released;
    release(released, warp, 1u << lane);
    std::vector<ThreadCopy> items;
    std::vector<Range> ranges;
    std::erase_if(copies.thread_copies, [&](const ThreadCopy& item) {
      if (item.issue.lane != lane) return false;
      items.push_back(item);
      ranges.push_back(destination_of(item));
      note_thread_copy(item.issue, *warp.cta, ranges.back(), completion);
      return true;
    });
    // The destinations stay in flight until somebody has waited for the barrier: a load that carries no bytes.
    auto load = std::make_shared<Load>(Load{issue, place.cta, place.offset, barrier.phase, ranges});
    copies_of(*warp.cta->cluster).loads.push_back(load);
    schedule(warp, i.text, [load, items, released] {
      Warp& issuer = *load->issue.warp;
      for (const ThreadCopy& item : items) {
        finish(item);
        set_in_flight(*issuer.cta, destination_of(item), true);
      }
      load->landed = true;
      merge(barrier_at(load->issue, *load->cta, load->barrier).clock, released);
      arrive(load->issue, *load->cta, load->barrier, 1);
    });
  }
  ++warp.step;
  return true;
}

}  // namespace

bool bind_thread_copy(Instruction& i) {
  if (i.opcode != "cp" || i.modifiers.size() < 2 || i.modifiers[0] != "async") return false;
  const std::string& what = i.modifiers[1];
  const size_t operands = i.operands.size();
  if (what == "commit_group" && i.modifiers.size() == 2) {
    i.execute = commit;
  } else if (what == "wait_all" && i.modifiers.size() == 2) {
    i.data[0] = 1;
    i.execute = wait;
  } else if (what == "wait_group" && i.modifiers.size() == 2 && operands == 1 &&
             i.operands[0].kind == Operand::Kind::immediate) {
    i.execute = wait;
  } else if (what == "mbarrier" && operands == 1 &&
             only(i, {"async", "mbarrier", "arrive", "noinc", "shared", "shared::cta", "b64"})) {
    i.data[0] = i.has("noinc");
    i.execute = arrive_after;
  } else if ((what == "ca" || what == "cg") && operands >= 3 && operands <= 5 &&
             i.operands[2].kind == Operand::Kind::immediate &&
             only(i, {"async", "ca", "cg", "shared", "shared::cta", "global", "L2::cache_hint", "L2::64B", "L2::128B",
                      "L2::256B"})) {
    const uint64_t size = i.operands[2].immediate;
    if (!std::has_single_bit(size) || size < 4 || size > 16 || (what == "cg" && size != 16)) return false;
    i.execute = copy;
  } else {
    return false;
  }
  return true;
}

}  // namespace hoppersim
