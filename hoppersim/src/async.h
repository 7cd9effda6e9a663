// The asynchronous units: mbarriers, cp.async, bulk and tensor copies, cluster barrier.
//
// A copy towards an mbarrier is a Load: issued (destination flagged in_flight), landed (bytes written, transaction
// count lowered), observed (its phase is complete and a wait on the barrier has succeeded: flags cleared).
// Timing::early lands it at once, Timing::late through Cluster::pending. A copy of a bulk group is a Store: its source
// bytes count as read (Granule::async_readers) until the issuing lane has waited for its group.
#pragma once

#include <array>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"
#include "ptx.h"
#include "report.h"

namespace hoppersim {

// Called by the scheduler.
// Nothing can run and nothing is pending: throws the more specific fault (wrong transaction counts) if there is one.
void async_check_deadlock(Cluster& cluster, const std::string& report);
// All warps of the cluster have ended: throws for copies nobody waited for, lands what may still land (bulk stores).
void async_finish(Cluster& cluster);

// ---- Inside the units
struct Range {
  uint32_t offset, size;
};

// Who issued a copy.
struct Issue {
  Warp* warp;
  const Instruction* instruction;
  int lane;
};

// Reductions may share a destination; st.async needs no proxy fence.
enum class LoadKind { copy, reduction, st_async };

struct Load {
  Issue issue;
  Cta* cta;                   // destination
  uint32_t barrier;           // offset of the mbarrier in the same CTA
  uint32_t phase;             // of the barrier at the issue
  std::vector<Range> ranges;  // of the destination
  Cta* source_cta = nullptr;  // shared to shared: the source counts as read until the load is observed
  Range source{};
  bool landed = false;
  bool abandoned = false;  // reported at the end of the kernel: it never lands
};

struct Store {
  Issue issue;
  Cta* cta;  // source
  Range source;
  int64_t group = -1;                                           // -1: not committed
  bool read = false, written = false, released = false;         // released: its lane has waited for the read
  std::vector<std::pair<uint64_t, uint64_t>> destination = {};  // global bytes, until its lane has waited for the write
};

// One cp.async of a lane.
struct ThreadCopy {
  Issue issue;
  uint64_t source;  // global
  uint32_t destination, size, source_size;
  int64_t group = -1;
};

// Warp::copies
struct WarpCopies {
  std::vector<ThreadCopy> thread_copies;
  std::array<int64_t, kLanes> thread_groups{}, bulk_groups{};  // committed so far
  std::vector<std::shared_ptr<Store>> stores;
  uint32_t cluster_arrived = 0;  // lanes that wait for the current generation of the cluster barrier
  std::array<uint64_t, kLanes> cluster_generation{};  // generation a lane arrived in
  uint32_t cluster_waiting = 0;                       // lanes between arrive and wait
  uint32_t failed_polls = 0;                          // consecutive unsuccessful test_wait of the whole warp
  struct TimeOuts {
    uint32_t offset, phase, count;
  };
  std::unordered_map<uint32_t, TimeOuts> time_outs;  // by pc: of the first wait there that might have to wait
};

// Cluster::copies
struct ClusterCopies {
  std::vector<std::shared_ptr<Load>> loads;  // not yet observed
  uint64_t completed_phases = 0;             // of all mbarriers
};

WarpCopies& copies_of(Warp& warp);
ClusterCopies& copies_of(Cluster& cluster);

// Runs `effect` now (early) or when no warp can run (late).
void schedule(Warp& warp, std::string what, std::function<void()> effect);

// ---- Operands
// The CTA and offset an address operand names; `local`: it must be the warp's own CTA.
SharedPlace place_of(Warp& warp, const Instruction& i, const Operand& operand, size_t size, bool local, int lane);
Space space_of(const Instruction& i, const char* prefix);
// Every modifier is one of `known` (a trailing * stands for any ending).
bool only(const Instruction& i, std::initializer_list<const char*> known);
bool has_any(const Instruction& i, std::initializer_list<const char*> names);

// ---- mbarriers (async_barrier.cpp)
Mbarrier& barrier_at(const Issue& issue, Cta& cta, uint32_t offset);
// The initialisation of the mbarrier must come before its use by this lane, or by the async proxy on its behalf.
void check_initialised(const Issue& issue, Cta& cta, uint32_t offset, bool async);
// The caller has released to the barrier's clocks.
void arrive(const Issue& issue, Cta& cta, uint32_t offset, uint32_t count);
void expect_bytes(const Issue& issue, Cta& cta, uint32_t offset, int64_t bytes);
void complete_bytes(const Issue& issue, Cta& cta, uint32_t offset, int64_t bytes);
// Such a copy has been issued: for what Mbarrier::late is held to.
void count_copied(const Issue& issue, Mbarrier& barrier, int64_t bytes);
std::string describe(const Cta& cta, uint32_t offset, const Mbarrier& barrier);

// ---- Copies (async.cpp)
[[noreturn]] void fault(const char* kind, const Issue& issue, const std::string& text);
void report(const char* kind, const Issue& issue, const std::string& text);  // report.h
void set_in_flight(Cta& cta, const Range& range, bool in_flight);
void hold_source(Cta& cta, const Range& range, int change);  // change: +1 or -1 outstanding readers
// Marks the destination as in flight; faults when another copy is on its way there or an outstanding read uses it.
std::shared_ptr<Load> issue_load(const Issue& issue, Cta& cta, uint32_t barrier, std::vector<Range> ranges,
                                 LoadKind kind = LoadKind::copy);
// Writes bytes of a load and lowers the barrier's transaction count.
void land(Load& load, const void* data);
// A wait on the barrier has succeeded: the loads of its completed phases are visible.
void observe(Cta& cta, uint32_t barrier);
// Reads the source of a store, then has `write` put it into global memory; both now or late. `used`: the parts of the
// source that reach memory; what a tensor store clips may be uninitialised. `destination`: addresses and sizes that it
// overwrites.
void issue_store(const Issue& issue, Cta& cta, Range source, std::vector<Range> used,
                 std::vector<std::pair<uint64_t, uint64_t>> destination,
                 std::function<void(std::vector<uint8_t>&)> write);
void check_global(const Issue& issue, uint64_t address, size_t size, bool write);

bool bind_mbarrier(Instruction& instruction);
bool bind_thread_copy(Instruction& instruction);
bool bind_bulk(Instruction& instruction);
bool bind_tensor_copy(Instruction& instruction);
bool bind_tensormap(Instruction& instruction);
bool bind_cluster(Instruction& instruction);

}  // namespace hoppersim
