// Warp specialisation (warp specialization): warps of one CTA with different work, such as a producer that loads and
// consumers that multiply. Which warp is this, which thread of it issues, how many registers has its warpgroup.
#pragma once

#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>

namespace jet::hopper {

// shfl.sync: the warp's index in the CTA, in a form that the compiler knows to be the same in all lanes.
__device__ inline int warp_index() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0); }

// elect.sync: true in one lane of a converged warp.
__device__ inline bool elect_one() { return cute::elect_one_sync() != 0; }

// setmaxnreg.dec.sync.aligned and setmaxnreg.inc.sync.aligned: registers per thread of a warpgroup, a multiple of 8,
// 24 to 256. The kernel needs __launch_bounds__ with a minimum of 1 CTA.
template <int registers>
__device__ void setmaxnreg_dec() {
  cutlass::arch::warpgroup_reg_dealloc<registers>();
}
template <int registers>
__device__ void setmaxnreg_inc() {
  cutlass::arch::warpgroup_reg_alloc<registers>();
}

}  // namespace jet::hopper
