// Warps, warpgroups and clusters: who am I, who leads, wait for the others.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>

#include "csrc/hopper/barrier.h"

namespace jet::hopper {

__device__ inline int cluster_rank() { return static_cast<int>(cute::block_rank_in_cluster()); }

// elect.sync: true in one lane of a converged warp.
__device__ inline bool elect_one() { return cute::elect_one_sync() != 0; }

// The same value in all lanes, in a form that the compiler knows to be uniform.
__device__ inline int warp_index() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0); }

// barrier.cluster: all threads of all CTAs of the cluster arrive (release) and wait (acquire).
__device__ inline void cluster_sync() {
  compiler_fence();
  cute::cluster_sync();
  compiler_fence();
}

// mapa: address, in the cluster's shared memory, of what lies at `pointer` in this CTA but in CTA `rank`.
__device__ inline uint32_t mapa(const void* pointer, int rank) {
  return cute::set_block_rank(cute::cast_smem_ptr_to_uint(pointer), rank);
}

// setmaxnreg: registers per thread of a warpgroup, a multiple of 8. The kernel needs __launch_bounds__ with a minimum
// of 1 block.
template <int registers>
__device__ void setmaxnreg_dec() {
  cutlass::arch::warpgroup_reg_dealloc<registers>();
}
template <int registers>
__device__ void setmaxnreg_inc() {
  cutlass::arch::warpgroup_reg_alloc<registers>();
}

}  // namespace jet::hopper
