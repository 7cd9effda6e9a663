// Races in global memory between the clusters of a launch.
//
// Clusters run on several host threads, so their order is apart from that of order.h, and coarser: a cluster counts
// epochs and knows epochs of others. A strong access (atomic, volatile, relaxed, acquire, release) to global memory
// releases to its address what its cluster has done and knows before it takes effect, and acquires after that.
// Only ld and st that are not strong are compared, and bulk and tensor copies; the order of threads within a cluster is
// not. What a bulk store writes nobody may touch until its lane has waited for its group.
#pragma once

#include "async.h"

namespace hoppersim {

constexpr uint64_t kOrderedClusters = 1024;  // of a launch; with more of them races in global memory are not looked for

struct GlobalOrder;  // Launch::global_order
struct ClusterOrder {
  uint32_t index = 0, epoch = 1;
  std::vector<uint32_t> known;  // by cluster: its epochs up to this one came before
};

// nullptr: races of this launch are not looked for.
std::shared_ptr<GlobalOrder> make_global_order(const Launch& launch);
std::shared_ptr<ClusterOrder> make_cluster_order(const Launch& launch, uint64_t index);

// The addresses of other spaces than global memory are passed over.
void release_global(Warp& warp, Space space, const uint64_t* addresses, uint32_t mask);
void acquire_global(Warp& warp, Space space, const uint64_t* addresses, uint32_t mask);
void note_global(Warp& warp, const Instruction& i, Space space, const uint64_t* addresses, uint32_t mask, size_t size,
                 bool write);
// Of bulk and tensor copies, when they are issued; and when the lane of a store has waited for it.
void check_global_load(const Issue& issue, uint64_t address, uint64_t size);
void begin_global_store(const Issue& issue, uint64_t address, uint64_t size);
void end_global_store(Warp& warp, uint64_t address, uint64_t size);

}  // namespace hoppersim
