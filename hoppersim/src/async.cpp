#include "async.h"

#include <algorithm>
#include <cstdio>

#include "races.h"
#include "races_global.h"

namespace hoppersim {

WarpCopies& copies_of(Warp& warp) {
  if (!warp.copies) warp.copies = std::make_shared<WarpCopies>();
  return *static_cast<WarpCopies*>(warp.copies.get());
}

ClusterCopies& copies_of(Cluster& cluster) {
  if (!cluster.copies) cluster.copies = std::make_shared<ClusterCopies>();
  return *static_cast<ClusterCopies*>(cluster.copies.get());
}

void fault(const char* kind, const Issue& issue, const std::string& text) {
  fault(kind, *issue.warp, *issue.instruction, text, issue.lane);
}

void report(const char* kind, const Issue& issue, const std::string& text) {
  report(kind, *issue.warp, *issue.instruction, text, issue.lane);
}

void schedule(Warp& warp, std::string what, std::function<void()> effect) {
  Cluster& cluster = *warp.cta->cluster;
  if (cluster.launch->options.timing == Timing::early) {
    effect();
  } else {
    cluster.pending.push_back({std::move(what), std::move(effect)});
  }
}

void check_global(const Issue& issue, uint64_t address, size_t size, bool write) {
  if (!size || !issue.warp->cta->cluster->launch->options.check_global) return;
  if (global_ranges().contains(address, size, write)) return;
  char text[96];
  std::snprintf(text, sizeof text, "%s of %zu bytes at global address 0x%llx", write ? "write" : "read", size,
                static_cast<unsigned long long>(address));
  fault("out-of-bounds global", issue, text);
}

// ---- Operands

Space space_of(const Instruction& i, const char* prefix) {
  const bool named = std::any_of(i.modifiers.begin(), i.modifiers.end(),
                                 [&](const std::string& m) { return m.rfind(prefix, 0) == 0; });
  return named ? Space::shared : Space::generic;
}

SharedPlace place_of(Warp& warp, const Instruction& i, const Operand& operand, size_t size, bool local, int lane) {
  const SharedPlace place = shared_place(warp, i, operand_value(warp, operand, lane), size, space_of(i, "shared"));
  if (local && place.cta != warp.cta)
    fault("address of another CTA", warp, i, "the instruction needs shared memory of its own CTA", lane);
  if (place.cta != warp.cta) access_remote(warp, i, *place.cta, lane);
  return place;
}

bool only(const Instruction& i, std::initializer_list<const char*> known) {
  return std::all_of(i.modifiers.begin(), i.modifiers.end(), [&](const std::string& modifier) {
    return std::any_of(known.begin(), known.end(), [&](const std::string name) {
      return name.back() == '*' ? modifier.compare(0, name.size() - 1, name, 0, name.size() - 1) == 0
                                : modifier == name;
    });
  });
}

bool has_any(const Instruction& i, std::initializer_list<const char*> names) {
  return std::any_of(names.begin(), names.end(), [&](const char* name) { return i.has(name); });
}

// ---- Loads

void set_in_flight(Cta& cta, const Range& range, bool in_flight) {
  uint8_t* flags = cta.shared.flags.data() + range.offset;
  for (uint32_t b = 0; b < range.size; ++b)
    flags[b] = in_flight ? flags[b] | SharedMemory::in_flight : flags[b] & ~SharedMemory::in_flight;
}

void hold_source(Cta& cta, const Range& range, int change) {
  if (!range.size) return;
  for (uint32_t g = range.offset / 16; g <= (range.offset + range.size - 1) / 16; ++g)
    cta.shared.granules[g].async_readers += change;
}

static void check_destination(const Issue& issue, const Cta& cta, const Range& range, LoadKind kind) {
  uint8_t any = 0;
  for (uint32_t b = 0; b < range.size; ++b) any |= cta.shared.flags[range.offset + b];
  if (any & SharedMemory::mbarrier)
    report("mbarrier accessed as memory", issue,
           "its destination holds an mbarrier: only mbarrier instructions may touch that between its init and inval");
  if (any & SharedMemory::in_flight && kind != LoadKind::reduction)
    report("overwritten while a copy is in flight", issue,
           "another copy to the same shared memory has not been waited for");
  for (uint32_t g = range.offset / 16; range.size && g <= (range.offset + range.size - 1) / 16; ++g)
    if (cta.shared.granules[g].async_readers)
      return report("overwritten while read", issue,
                    "an outstanding wgmma or bulk store still reads shared offset " + std::to_string(g * 16));
}

std::shared_ptr<Load> issue_load(const Issue& issue, Cta& cta, uint32_t barrier, std::vector<Range> ranges,
                                 LoadKind kind) {
  Mbarrier& mbarrier = barrier_at(issue, cta, barrier);
  for (const Range& range : ranges) {
    check_destination(issue, cta, range, kind);
    note_async_write(issue, cta, range, completion_of(cta, barrier, mbarrier, mbarrier.phase), kind);
    set_in_flight(cta, range, true);
  }
  check_initialised(issue, cta, barrier, true);
  release(mbarrier.weak, *issue.warp, 1u << issue.lane);  // the phase ends after it
  ++issue.warp->step;
  for (const Range& range : ranges) count_copied(issue, mbarrier, range.size);
  auto load = std::make_shared<Load>(Load{issue, &cta, barrier, mbarrier.phase, std::move(ranges)});
  copies_of(*cta.cluster).loads.push_back(load);
  return load;
}

void land(Load& load, const void* data) {
  const Issue& issue = load.issue;
  if (load.abandoned) return;
  if (load.cta->ended) report("exit with a load in flight", issue, "the destination CTA has ended");
  int64_t bytes = 0;
  for (const Range& range : load.ranges) {
    set_in_flight(*load.cta, range, false);
    async_write_shared(*issue.warp, *issue.instruction, *load.cta, range.offset, range.size,
                       static_cast<const uint8_t*>(data) + bytes);
    set_in_flight(*load.cta, range, true);
    bytes += range.size;
  }
  load.landed = true;
  complete_bytes(issue, *load.cta, load.barrier, bytes);
}

void observe(Cta& cta, uint32_t barrier) {
  auto& loads = copies_of(*cta.cluster).loads;
  if (loads.empty()) return;
  const uint32_t phase = cta.mbarriers.at(barrier).phase;
  std::erase_if(loads, [&](const std::shared_ptr<Load>& load) {
    if (load->cta != &cta || load->barrier != barrier || load->phase == phase) return false;
    for (const Range& range : load->ranges) set_in_flight(cta, range, false);
    if (load->source_cta) hold_source(*load->source_cta, load->source, -1);
    return true;
  });
}

// ---- Stores

void issue_store(const Issue& issue, Cta& cta, Range source, std::vector<Range> used,
                 std::vector<std::pair<uint64_t, uint64_t>> destination,
                 std::function<void(std::vector<uint8_t>&)> write) {
  auto store = std::make_shared<Store>(Store{issue, &cta, source});
  auto& stores = copies_of(*issue.warp).stores;
  // CUTLASS has all lanes of a warp store the same at once.
  const bool again = !stores.empty() && stores.back()->issue.instruction == issue.instruction &&
                     stores.back()->issue.lane < issue.lane && stores.back()->destination == destination;
  stores.push_back(store);
  if (!again)
    for (const auto& [address, size] : destination) begin_global_store(issue, address, size);
  if (cta.cluster->global_order) store->destination = std::move(destination);
  Warp& warp = *issue.warp;
  for (const Range& part : used) {
    async_read_shared(warp, *issue.instruction, cta, part.offset, part.size, nullptr);
    check_async_read(issue, cta, part);  // here: a late read must not profit from a later fence
  }
  hold_source(cta, source, 1);
  schedule(warp, "read of " + issue.instruction->text,
           [store, used = std::move(used), write = std::move(write)]() mutable {
             auto data = std::make_shared<std::vector<uint8_t>>(store->source.size);
             Warp& issuer = *store->issue.warp;
             for (const Range& part : used)
               async_read_shared(issuer, *store->issue.instruction, *store->cta, part.offset, part.size,
                                 data->data() + (part.offset - store->source.offset));
             store->read = true;
             schedule(issuer, "write of " + store->issue.instruction->text, [store, data, write = std::move(write)] {
               write(*data);
               store->written = true;
             });
           });
}

// ---- For the scheduler

// A byte count that never came out right: told at the last expect_tx of the mbarrier.
[[noreturn]] static void miscounted(const char* kind, const Cluster& cluster, const Cta& cta, uint32_t offset,
                                    const Mbarrier& barrier, const std::string& text) {
  const Function& function = *cluster.launch->function;
  std::string last = "no expect_tx";
  if (barrier.expected_by) last = "last expect_tx at " + position(function, *barrier.expected_by);
  throw fault_in(kind, "kernel " + function.title + ", " + describe(cta, offset, barrier) + "; " + last + text,
                 function, barrier.expected_by);
}

void async_check_deadlock(Cluster& cluster, const std::string& report) {
  const auto& loads = copies_of(cluster).loads;
  for (const auto& cta : cluster.ctas) {
    for (const auto& [offset, barrier] : cta->mbarriers) {
      if (barrier.tx < 0) miscounted("expect_tx too small", cluster, *cta, offset, barrier, "\n" + report);
      const bool outstanding = std::any_of(loads.begin(), loads.end(), [&, offset = offset](const auto& load) {
        return load->cta == cta.get() && load->barrier == offset && !load->landed;
      });
      if (barrier.pending == 0 && barrier.tx > 0 && !outstanding)
        miscounted("expect_tx too large", cluster, *cta, offset, barrier, "; all its copies are complete\n" + report);
    }
  }
}

void async_finish(Cluster& cluster) {
  for (const auto& cta : cluster.ctas)
    for (const auto& [offset, barrier] : cta->mbarriers)
      if (barrier.tx < 0) miscounted("expect_tx too small", cluster, *cta, offset, barrier, "; the kernel has ended");
  for (const auto& load : copies_of(cluster).loads) {
    report("exit with a load in flight", load->issue,
           std::string(load->landed ? "nobody has waited for " : "not complete when the kernel ended; expected at ") +
               describe(*load->cta, load->barrier, load->cta->mbarriers[load->barrier]));
    load->abandoned = true;
  }
  for (const auto& cta : cluster.ctas) {
    for (const auto& [agent, copy] : cta->copied) {
      if (knows(cta->exit_clock, copy.event, 1, false)) continue;
      report("access to an ended CTA", *copy.warp, *copy.instruction,
             "it reads the shared memory of " + name_of(*cta) +
                 ", and no barrier orders its completion before the end of that CTA",
             copy.lane);
    }
    for (const auto& warp : cta->warps) {
      for (const auto& store : copies_of(*warp).stores)
        if (!store->released)
          report("exit with a copy in flight", store->issue, "the bulk group of this store was not waited for");
      for (const ThreadCopy& copy : copies_of(*warp).thread_copies)
        report("exit with a load in flight", copy.issue, "this cp.async was not waited for");
    }
  }
  while (!cluster.pending.empty()) {
    const auto complete = std::move(cluster.pending.front().complete);
    cluster.pending.pop_front();
    complete();
  }
}

bool bind_async(Instruction& instruction) {
  return bind_mbarrier(instruction) || bind_thread_copy(instruction) || bind_bulk(instruction) ||
         bind_tensor_copy(instruction) || bind_tensormap(instruction) || bind_cluster(instruction);
}

}  // namespace hoppersim
