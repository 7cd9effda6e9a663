// TMA: copies between global and shared memory by the copy engine, of boxes of a tensor map (cp.async.bulk.tensor) and
// of contiguous bytes (cp.async.bulk). Each is issued by one thread, for the whole CTA.
#pragma once

#include <cuda.h>

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "csrc/hopper/barrier.h"

namespace jet::hopper {

// .L2::cache_hint of a load: how long the lines should stay in the L2.
enum class CacheHint : uint64_t {
  evict_normal = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
  evict_first = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST),
  evict_last = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST),
};

// prefetch.tensormap
__device__ inline void prefetch_tensormap(const CUtensorMap& map) { cute::prefetch_tma_descriptor(&map); }

// cp.async.bulk.tensor.Nd.shared::cluster.global.mbarrier::complete_tx::bytes: loads the box at `coordinates` (1 to 5,
// dimension 0 first) to `shared`, 128-byte aligned; completes its bytes on `barrier`.
template <class... Coordinates>
__device__ void tma_load(void* shared, const CUtensorMap& map, Mbarrier& barrier, CacheHint hint,
                         Coordinates... coordinates) {
  cute::SM90_TMA_LOAD::copy(&map, barrier.object(), static_cast<uint64_t>(hint), shared, coordinates...);
}

// cp.async.bulk.tensor .multicast::cluster: the same into every CTA of the cluster whose bit is set in `ranks`, at the
// same offset, each completing on its own `barrier`.
template <class... Coordinates>
__device__ void tma_load_multicast(void* shared, const CUtensorMap& map, Mbarrier& barrier, uint16_t ranks,
                                   CacheHint hint, Coordinates... coordinates) {
  cute::SM90_TMA_LOAD_MULTICAST::copy(&map, barrier.object(), ranks, static_cast<uint64_t>(hint), shared,
                                      coordinates...);
}

// cp.async.bulk.prefetch.tensor.Nd.L2.global: asks for the box to be brought into the L2. There is nothing to wait for.
template <class... Coordinates>
__device__ void tma_prefetch(const CUtensorMap& map, Coordinates... coordinates) {
  cute::SM90_TMA_LOAD::PREFETCH::copy(&map, coordinates...);
}

// cp.async.bulk.tensor.Nd.global.shared::cta.bulk_group: stores a box from `shared`. Ordinary writes to it must have
// been made visible to the async proxy: fence_proxy_async(), then a barrier.
template <class... Coordinates>
__device__ void tma_store(const CUtensorMap& map, const void* shared, Coordinates... coordinates) {
  cute::SM90_TMA_STORE::copy(&map, shared, coordinates...);
}

// cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes: contiguous bytes; addresses and size are multiples
// of 16.
__device__ inline void cp_async_bulk_load(void* shared, const void* global, int bytes, Mbarrier& barrier) {
  cute::SM90_BULK_COPY_G2S::copy(global, barrier.object(), shared, bytes);
}
// cp.async.bulk.global.shared::cta.bulk_group
__device__ inline void cp_async_bulk_store(void* global, const void* shared, int bytes) {
  cute::SM90_BULK_COPY_S2G::copy(shared, global, bytes);
}

// cp.async.bulk.commit_group: ends a group of stores. The thread that issued them waits for groups, until at most
// `groups_left` of the newest are pending.
__device__ inline void cp_async_bulk_commit_group() {
  cute::tma_store_arrive();
  compiler_fence();
}
// cp.async.bulk.wait_group.read: the groups' shared memory may be overwritten.
template <int groups_left>
__device__ void cp_async_bulk_wait_group_read() {
  cute::tma_store_wait<groups_left>();
}
// cp.async.bulk.wait_group: the groups' results are in global memory.
template <int groups_left>
__device__ void cp_async_bulk_wait_group() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(groups_left) : "memory");
}

}  // namespace jet::hopper
