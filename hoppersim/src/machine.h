// The simulated machine: what the interpreter, the asynchronous units and the runtime share.
//
// One Launch runs a grid. CTAs of a cluster run together on one host thread; clusters are independent work items. A
// warp executes 32 lanes under a mask. Host memory is global memory. All errors are thrown as Fault with the PTX
// position.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace hoppersim {

constexpr int kLanes = 32;
constexpr uint64_t kSharedWindow = 1ull << 52;  // generic address = kSharedWindow + cluster rank * kRankStride + offset
constexpr uint64_t kLocalWindow = 1ull << 53;   // generic address = kLocalWindow + offset (per thread)
constexpr uint32_t kRankStride = 1u << 24;      // shared::cluster address = cluster rank * kRankStride + offset
constexpr uint32_t kSharedBase =
    1024;  // the first KiB belongs to the system, as on the device: address 0 is never valid
constexpr uint32_t kReservedForKernels = 512;  // … but what lies from here on, if the kernel asks for it by a register
constexpr int kSharedLimit = 227 * 1024;       // dynamic + static bytes a CTA of sm_90 may have

struct Function;     // ptx.h
struct MapProxy;     // tensor_map_proxy.h
struct Instruction;  // ptx.h

enum class Severity { error, warning };

// A finding. `kind` is stable (tests match it), e.g. "out-of-bounds shared", "missing proxy fence"; report.h lists
// them.
struct Report {
  std::string kind, text;  // the text begins with the kind and says where
  Severity severity = Severity::error;
  std::string kernel, mangled;  // its name as C++ has it, and as the PTX
  std::string source;           // "gemm.cu:7, inlined at …" (source_lines.h); empty: not known
  std::string instruction;
  int line = 0;               // of the PTX text, 0: of no instruction
  std::vector<uint32_t> cta;  // its coordinates; empty: of no CTA
  int warp = -1, lane = -1;
  uint64_t count = 1;   // how often it was found
  bool raised = false;  // as a Fault
};

// Reports, each kind and PTX line of a kernel once. Filled by several host threads.
struct Reports {
  std::mutex mutex;
  std::vector<Report> list;
  void add(const Report& report);
  std::vector<Report> errors() const;
};

// A finding that stops the launch.
struct Fault : std::runtime_error {
  Fault(const std::string& kind, const std::string& text) : std::runtime_error(kind + ": " + text) {
    report.kind = kind, report.text = what();
  }
  explicit Fault(Report r) : std::runtime_error(r.text), report(std::move(r)) {}
  Report report;
  std::vector<Report> collected;  // all errors of simulate(go_on=True); empty: this one
};

constexpr uint64_t kMaxInstructions = 300'000'000, kLiveLockTotal = 100, kLiveLockClusters = 16;

enum class Timing { early, late };  // asynchronous effects at once, or as late as their completion mechanism allows

struct Options {
  Timing timing = Timing::early;
  uint64_t seed = 0;  // order of warps and CTAs; 0: in order
  int host_threads = 2;
  // Clusters that execute as many without progress (class_progresses), times their number up to kLiveLockClusters, are
  // reported as a live-lock, and one that executes kLiveLockTotal times as many at all. The default is about two
  // minutes of a spinning warp.
  uint64_t max_instructions = kMaxInstructions;
  bool check_global = true;                       // global accesses must fall into registered or cudaMalloc'ed ranges
  std::vector<std::string> allow, warn_as_error;  // kinds that are dropped, and warnings that are errors
  bool strict = false;                            // every warning is an error
  bool go_on = false;                             // errors that leave the machine in a defined state are collected
};

struct Counters {
  std::map<std::string, uint64_t> instructions;  // warp instructions by class: "alu", "fma", "ld.global", "wgmma", ...
  uint64_t warp_instructions = 0;
  uint64_t tensor_flop = 0;                                    // 2 M N K of wgmma and mma
  uint64_t global_read_bytes = 0, global_write_bytes = 0;      // by threads, bytes asked for
  uint64_t global_read_sectors = 0, global_write_sectors = 0;  // 32-byte sectors touched per warp access
  uint64_t bulk_read_bytes = 0, bulk_write_bytes = 0;  // TMA and bulk copies: global bytes in bounds (multicast: once)
  uint64_t shared_accesses = 0, shared_wavefronts = 0,
           shared_ideal_wavefronts = 0;  // conflict factor = wavefronts / ideal
  uint64_t wgmma_wavefronts = 0;         // of operand tiles in shared memory, by the model of tensor.cpp
  uint64_t barrier_waits = 0;            // unsuccessful mbarrier try_wait / test_wait
  void add(const Counters& other);
  std::vector<std::pair<const char*, uint64_t>> numbers() const;  // all but `instructions`, by name
};

// ---- What happens before what (order.h). An agent is a warp of the cluster (index = cluster rank * warps per CTA +
// warp), the wgmma of a warpgroup, or the copies towards an mbarrier; it counts steps. A clock, indexed by agent, tells
// which steps are known.
struct Known {
  uint32_t all = 0;              // up to this step, of every lane
  uint32_t some = 0, lanes = 0;  // up to this step, of these lanes
};
using Clock = std::vector<Known>;
void merge(Clock& into, const Clock& from);

// An access to a granule of 16 bytes, as the granule remembers it.
struct Stamp {
  uint32_t step = 0;
  uint32_t lanes = 0;  // of the warp; of another agent: its issuer, clock index * 32 + lane
  uint16_t agent = 0;
  uint16_t bytes = 0;  // of the granule; 0: no access
  uint32_t pc : 21 = 0;
  uint32_t share : 5 = 0;  // bytes of each lane, in order from `start`; 0: every lane all, kMixed: forgotten
  uint32_t start : 4 = 0;
  uint32_t strong : 1 = 0;   // atomic, volatile, relaxed, …: no race with another such
  uint32_t generic : 1 = 0;  // the async proxy sees it after a proxy fence only
};

// ---- Shared memory with its shadow: one byte of flags per byte, the last accesses per granule of 16 bytes (races.h).
struct SharedMemory {
  enum Flag : uint8_t {
    written = 1,
    in_flight = 2,  // an asynchronous copy will write it, not yet complete
    mbarrier = 4    // of an mbarrier between its init and inval
  };
  std::vector<uint8_t> bytes, flags;
  struct Granule {
    Stamp write, reads[2];
    int32_t async_readers = 0;  // outstanding wgmma or bulk-store reads
    uint32_t more = 0;          // index into `more` plus 1, 0: none
  };
  struct More {
    std::vector<Stamp> writes, reads;
  };
  std::vector<Granule> granules;
  std::deque<More> more;  // accesses for which a granule has no room
  void resize(size_t size);
  void clear(size_t begin, size_t end);  // written, with zeros
};

struct Cta;
struct Cluster;
struct Launch;
struct Order;         // order.h
struct ClusterOrder;  // races_global.h
struct GlobalOrder;
struct Warp;

// A `mbarrier.expect_tx` of the current phase that none of its arrivals comes after, so far.
struct LateExpect {
  Warp* warp;
  const Instruction* instruction;
  int lane;
  Stamp event;
  int64_t bytes, others;  // others: of the phase's copies that do not come after it
};

struct Mbarrier {
  uint32_t expected = 0;       // arrivals per phase
  int32_t pending = 0;         // arrivals still missing in this phase
  int64_t tx = 0;              // transaction bytes still missing (may be negative for a moment)
  uint32_t phase = 0;          // completed phases; the parity waited for is that of a completed phase
  Clock clock;                 // merged clocks of the arrivals
  Clock completed_clock;       // clock that a successful wait acquires
  Clock preceding_clock;       // that of the phase before
  Clock weak, completed_weak;  // Warp::weak of the arrivals, likewise
  int32_t agent = -1;          // of the copies towards it; -1: none yet
  uint32_t first_step = 0;     // its step in phase 0
  Stamp initialised;
  Stamp fenced, async_fenced;  // the first fence, fence.mbarrier_init, by lanes that knew of that; step 0: not yet
  const Instruction* expected_by = nullptr;  // the last expect_tx
  std::vector<LateExpect> late;              // of this phase
  int64_t in_time = 0, copied = 0;           // bytes of this phase: expected by others than those, of its copies
  std::vector<Stamp> waits;                  // that succeeded for the phase before this one: the last of each warp
  bool relaxed_waits = false;                // what they know is not followed further than their warp
};

// A fence.proxy.async, and the writes that it and those of its warp before it cover beside what its lanes wrote.
struct ProxyFence {
  Stamp event;  // lanes: kAll, if the whole warp executes it
  Clock covered;
};
using ProxyFences = std::vector<std::deque<ProxyFence>>;  // of one memory; of each warp, in order

// ---- Warp
// Lanes with equal pc form a group; the group with the lowest pc that can run is run (independent thread scheduling).
struct Group {
  uint32_t pc;
  uint32_t mask;
  // Set while the group waits (moved here from the warp when `execute` returned false).
  std::function<bool()> can_resume = nullptr;
  std::string waiting_for = {};
  bool converging = false;  // waits for the other lanes of its warp at this pc
  uint64_t ticket = 0;      // what a retried instruction remembers of its first try; 0: first try
};

struct WgmmaGroupState;  // async.h: outstanding wgmma of a warp, by commit group

struct Warp {
  enum class State { ready, waiting, done };
  Cta* cta = nullptr;
  int id = 0;  // in the CTA
  State state = State::ready;
  std::string waiting_for;           // for the dead-lock report
  std::function<bool()> can_resume;  // waiting -> ready when true
  uint32_t alive = 0xffffffffu;      // lanes that exist and have not exited
  std::vector<Group> groups;
  std::vector<uint32_t>
      registers;  // laid out by Function: a b32 register is 32 words, a b64 one 64 (lane-major: lane i at i, or 2 i)
  std::vector<uint32_t> predicates;         // one mask per predicate register
  std::vector<uint8_t> register_in_flight;  // per register: outstanding wgmma accumulators that write it
  std::vector<std::vector<uint8_t>> local;  // per lane
  Clock clock;                              // what every lane knows
  uint32_t step = 1;                        // of its accesses; what it releases ends one
  struct Partial {
    uint32_t lanes;
    Clock clock;
  };
  std::vector<Partial> partial;  // what only these lanes know beside
  Clock fenced, relaxed;         // what a fence has released for a relaxed access, what one has acquired for a fence
  Clock weak;                    // what came before by relaxed arrivals: in time, without order of memory
  std::shared_ptr<void> async;   // owned by the asynchronous units (wgmma groups, cp.async and bulk groups)
  std::shared_ptr<void> copies;  // async.h: cp.async and bulk groups of the lanes, arrivals at the cluster barrier
  std::shared_ptr<void> tensor;  // owned by wgmma: outstanding operations (tensor.cpp)
  uint32_t tid[3][kLanes];
  int clock_index() const;
  Group* current = nullptr;                    // the group that executes
  uint32_t exists = 0xffffffffu;               // lanes the launch gave this warp
  uint32_t carry = 0;                          // CC.CF of each lane
  uint32_t changed = 0;                        // lanes of the last st that changed global memory
  std::vector<const Instruction*> setmaxnreg;  // that it has executed
  uint32_t registers_held = 0;                 // per thread, of the CTA's pool
  uint64_t since_merge = 0;  // instructions since groups last changed: a spinning group must let the others run
};

struct Cta {
  Cluster* cluster = nullptr;
  int rank = 0;  // in the cluster
  uint32_t ctaid[3] = {};
  SharedMemory shared;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unordered_map<uint32_t, Mbarrier> mbarriers;  // by offset
  struct NamedBarrier {
    uint32_t expected = 0, arrived = 0;  // threads
    uint64_t generation = 0;
    Clock clock, completed_clock;
    Clock weak, completed_weak;  // Warp::weak of the arrivals at barrier.cluster
    uint32_t true_count = 0, completed_true_count = 0,
             completed_count = 0;  // barrier.red: threads whose predicate held, of how many
  };
  NamedBarrier named[16];
  std::map<std::pair<uint64_t, int>, std::pair<uint64_t, uint32_t>>
      acquired_maps;            // tensor map and warp: generation of the map, step of the warp
  uint32_t free_registers = 0;  // of the pool of setmaxnreg, in registers per thread of one warp
  ProxyFences fences;           // of its shared memory
  std::unordered_map<uint32_t, std::pair<int32_t, uint32_t>> barrier_agents;  // by offset: agent, its next step
  struct RemoteAccess {
    const Warp* warp;
    const Instruction* instruction;
    int lane;
    Stamp event;
  };
  std::map<int, RemoteAccess> remote_accesses;  // the last of each warp of other CTAs to this shared memory
  std::map<size_t, RemoteAccess> copied;        // copies between CTAs that read it: the last towards each mbarrier
  Clock exit_clock;                             // what came before the exits of its warps
  bool ended = false;
};

// An asynchronous operation that has been issued and not yet taken effect (Timing::late) or completed.
struct Pending {
  std::string what;  // for reports
  std::function<void()> complete;
};

struct Cluster {
  Launch* launch = nullptr;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::shared_ptr<void> copies;  // async.h: copies on their way to an mbarrier, bulk stores
  std::shared_ptr<Order> order;
  std::shared_ptr<ClusterOrder> global_order;  // races_global.h; nullptr: races in global memory are not looked for
  std::deque<Pending> pending;                 // completed one by one when no warp can run (late), in seeded order
  Cta::NamedBarrier barrier;                   // barrier.cluster
  std::mt19937_64 random;
  Counters counters;
  uint64_t executed = 0;
  std::vector<uint64_t> class_counts;  // by Instruction::counter_class, folded into counters at the end
};

struct Dim3 {
  uint32_t x = 1, y = 1, z = 1;
};

struct Launch {
  const Function* function = nullptr;
  Dim3 grid, block, cluster;
  uint32_t dynamic_shared = 0;
  uint32_t registers = 256;         // per thread at the start, for setmaxnreg
  bool registers_known = false;     // exactly; else it is the most that the launch bound allows
  std::vector<uint8_t> parameters;  // laid out as the PTX .param list
  Options options;
  Counters counters;
  Reports reports;                            // warnings, and the errors that did not stop it
  std::shared_ptr<MapProxy> maps;             // tensor_map_proxy.h; set by run()
  std::shared_ptr<GlobalOrder> global_order;  // races_global.h; set by run()
  std::atomic<uint64_t> looked{0};            // instructions executed since a cluster has made progress
  std::atomic<uint64_t> begun{0}, ended{0};   // clusters
  uint64_t most_resident = ~0ull;             // clusters that the device holds at once
  bool cooperative = false;                   // all must be
  uint64_t grid_workspace = 0;                // address of the grid's barrier, if so; set by run()
  uint8_t* parameter_base = nullptr;          // copy of the parameters, aligned to 128 bytes; set by run()
};

// launch.cpp: runs a launch to its end on options.host_threads threads; throws Fault.
void run(Launch& launch);

// ---- For everybody who reports
// "CTA (0, 1, 0)"; in a cluster "CTA (0, 1, 0), rank 1 of its cluster"
std::string name_of(const Cta& cta);
// "CTA (0, 1, 0), warp 3", by the index of its clock.
std::string name_of_warp(const Cluster& cluster, size_t clock_index);
std::string hex(uint64_t value);  // "0x400"
// "kernel gemm, gemm.cu:7, ptx line 120: cp.async.bulk…, CTA (0, 1, 0), warp 3, lane 0"
std::string where(const Warp& warp, const Instruction& instruction, int lane = -1);
// A fault of that kernel, at the instruction unless null.
Fault fault_in(const char* kind, const std::string& text, const Function& function, const Instruction* instruction);
// "gemm.cu:7, ptx line 120: wgmma…"; the first only where -lineinfo told it.
std::string position(const Function& function, const Instruction& instruction);
[[noreturn]] void fault(const char* kind, const Warp& warp, const Instruction& instruction, const std::string& text,
                        int lane = -1);

// ---- Memory accesses of every unit, with bounds, alignment, initialisation and hazard checks (memory.cpp)
enum class Space { generic, global, shared, local, param, constant };

struct GlobalRanges {  // registered by the runtime (allocations) and by tests (tensors)
  void add(const void* begin, size_t size, bool writable = true);
  void remove(const void* begin);
  bool contains(uint64_t address, size_t size, bool write) const;
};
GlobalRanges& global_ranges();

struct SharedPlace {
  Cta* cta;
  uint32_t offset;
};
// A shared::cluster or generic address -> the CTA of the cluster and the offset in it; faults when it names none.
SharedPlace shared_place(Warp& warp, const Instruction& instruction, uint64_t address, size_t size, Space space);

// ---- Exits of the CTAs of a cluster (async_cluster.cpp)
// A thread accesses the shared memory of another CTA: that must come before the end of the CTA.
void access_remote(Warp& warp, const Instruction& instruction, Cta& target, int lane);
// All lanes of the warp have exited.
void warp_ended(Warp& warp);

// Plain (generic-proxy) access by one lane. `data` has `size` bytes.
void read_memory(Warp& warp, const Instruction& i, Space space, uint64_t address, size_t size, void* data, int lane);
void write_memory(Warp& warp, const Instruction& i, Space space, uint64_t address, size_t size, const void* data,
                  int lane);

// Access by the async proxy (TMA, wgmma, bulk copies) to shared memory; races.h checks its order and its fences.
void async_read_shared(Warp& warp, const Instruction& i, Cta& cta, uint32_t offset, size_t size, void* data);
void async_write_shared(Warp& warp, const Instruction& i, Cta& cta, uint32_t offset, size_t size, const void* data);

// Adds the wavefronts of one warp access: addresses of active lanes, bytes per lane (4, 8 or 16).
void count_shared(Counters& counters, const uint32_t* offsets, uint32_t mask, int bytes_per_lane);
void count_global(Counters& counters, const uint64_t* addresses, uint32_t mask, int bytes_per_lane, bool write);

}  // namespace hoppersim
