// Barriers and fences of a CTA: mbarrier, named barriers (bar.sync), fence.proxy.async.
//
// An mbarrier lies in shared memory; threads and asynchronous copies arrive on it. It completes one phase after the
// other, and a wait names the phase by its parity. Variables are named for what is true when the wait returns:
// `weights_loaded`, `stage_read`.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

namespace jet::hopper {

// The phase parity of mbarrier.try_wait.parity: which phase a wait is for, modulo 2. Phases are numbered from 0.
struct PhaseParity {
  uint32_t bit;
  __device__ static PhaseParity first() { return {0}; }      // of phase 0
  __device__ static PhaseParity preceding() { return {1}; }  // of the one before it: on a new mbarrier it is complete
  __device__ void flip() { bit ^= 1; }
};

// No instruction: keeps the compiler from moving memory accesses across. CUTLASS's wrappers, which those below call,
// are volatile asm without a memory clobber.
__device__ inline void compiler_fence() { asm volatile("" ::: "memory"); }

#ifdef JET_WATCHDOG
// For finding dead-locks: a wait that takes longer than any kernel should leaves a record and stops the kernel. The
// records lie in host memory that whoever wants to read them has mapped at a fixed address
// (benchmarks/gpu_run/watchdog.py), because the device's memory is lost with the kernel. A printf would do without
// that, but a call makes ptxas serialise wgmma and ignore setmaxnreg: another kernel.
namespace watchdog {

constexpr uint64_t kRecords = 0x3a0000000000;
constexpr int kSlots = 256;
constexpr uint32_t kLongestWait = 2'000'000'000,
                   kPatience = 20'000'000;  // ns; the second leaves other threads time for their records

struct Record {
  uint32_t block[3], thread, threads, barrier, parity, written;
};
static_assert(sizeof(Record) == 32);

__device__ inline uint32_t now() {  // wraps; differences are right
  uint32_t ns;
  asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(ns));
  return ns;
}

__device__ inline void stop(uint32_t barrier, uint32_t parity) {
  const uint32_t start = now(), block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  volatile Record& record =
      reinterpret_cast<volatile Record*>(kRecords)[(block * (blockDim.x / 32) + threadIdx.x / 32) % kSlots];
  record.block[0] = blockIdx.x, record.block[1] = blockIdx.y, record.block[2] = blockIdx.z;
  record.thread = threadIdx.x, record.threads = blockDim.x;
  record.barrier = barrier, record.parity = parity, record.written = 1;
  __threadfence_system();
  while (now() - start < kPatience) {}
  __trap();
}

}  // namespace watchdog
#endif

// An mbarrier object, 8 bytes of shared memory. A phase is complete when `arrivals` threads have arrived and all
// expected bytes (its tx-count) have been copied.
class Mbarrier {
 public:
  // mbarrier.init
  __device__ void init(int arrivals) { Hardware::init(&object_, arrivals); }

  // mbarrier.arrive
  __device__ void arrive() {
    compiler_fence();
    Hardware::arrive(&object_);
  }

  // mapa and mbarrier.arrive.shared::cluster: on the same mbarrier of the CTA `rank` of the cluster.
  __device__ void arrive_remote(int rank) {
    compiler_fence();
    Hardware::arrive(&object_, rank, 1);
  }

  // mbarrier.arrive.expect_tx: arrives, and adds `bytes` to the tx-count of this phase.
  __device__ void arrive_expect_tx(int bytes) {
    compiler_fence();
    Hardware::arrive_and_expect_tx(&object_, bytes);
  }

  // mbarrier.try_wait.parity in a loop: returns when the phase is complete.
  __device__ void wait(PhaseParity parity) {
#ifdef JET_WATCHDOG
    const uint32_t start = watchdog::now();
    while (!Hardware::try_wait(&object_, parity.bit))
      if (watchdog::now() - start > watchdog::kLongestWait)
        watchdog::stop(static_cast<uint32_t>(__cvta_generic_to_shared(&object_)), parity.bit);
#else
    Hardware::wait(&object_, parity.bit);
#endif
    compiler_fence();
  }

  __device__ uint64_t* object() { return &object_; }  // for the copies that complete bytes on it

 private:
  using Hardware = cutlass::arch::ClusterTransactionBarrier;
  uint64_t object_;
};
static_assert(sizeof(Mbarrier) == 8);

// fence.mbarrier_init.release.cluster: makes `Mbarrier::init` visible to other threads of the cluster and to
// asynchronous copies. __syncthreads or cluster_sync must follow.
__device__ inline void fence_mbarrier_init() {
  cutlass::arch::fence_barrier_init();
  compiler_fence();
}

// fence.proxy.async.shared::cta: makes this thread's ordinary (generic-proxy) writes to shared memory visible to the
// async proxy (wgmma operands, TMA stores). It stands between the writes and the barrier behind which the wgmma or the
// store is issued.
__device__ inline void fence_proxy_async() {
  compiler_fence();
  cutlass::arch::fence_view_async_shared();
  compiler_fence();
}

// bar.sync id, threads: `threads` threads, whole warps, on the named barrier `id`, 1..15 (0 is __syncthreads).
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace jet::hopper
