// cp.async: copies of 16 bytes from global to shared memory by the threads themselves, in groups that each thread waits
// for.
#pragma once

#include <cute/arch/copy_sm80.hpp>

namespace jet::hopper {

// cp.async.cg.shared.global 16, with src-size 16, or 0 where not `asked`: then nothing is read and zeros are written.
__device__ inline void cp_async_16(void* shared, const void* global, bool asked) {
  using Copy = cute::SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<cute::uint128_t, cute::uint128_t>;
  Copy::copy(*static_cast<const cute::uint128_t*>(global), *static_cast<cute::uint128_t*>(shared), asked);
}

// cp.async.commit_group: ends this thread's group of copies.
__device__ inline void cp_async_commit_group() {
  cute::cp_async_fence();
  asm volatile("" ::: "memory");
}

// cp.async.wait_group: until at most `groups_left` of this thread's newest groups are pending. Other threads see what
// has been copied after a barrier.
template <int groups_left>
__device__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

}  // namespace jet::hopper
