// mbarrier: barriers in shared memory that threads and asynchronous copies arrive on. One is named for what has
// happened when a wait on it returns: `weights_loaded`, `stage_read`. It completes phase after phase; a Parity says
// which phase is waited for.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

namespace jet::hopper {

// The parity of the phase that a wait means: phases are numbered from 0, and only odd and even are told apart.
struct Parity {
  uint32_t bit;
  __device__ static Parity first() { return {0}; }  // returns once phase 0 is complete
  __device__ static Parity past() {
    return {1};
  }  // returns at once on a new Mbarrier, as if a phase before 0 were complete
  __device__ void next() { bit ^= 1; }
};

// Keeps the compiler from moving memory accesses across: the wrappers below are volatile asm without a memory clobber.
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

// An mbarrier object, 8 bytes of shared memory. A phase is complete when as many arrivals as `init` said and all
// expected bytes (tx-count) have come.
class Mbarrier {
 public:
  // mbarrier.init
  __device__ void init(int arrivals) { Hardware::init(&word_, arrivals); }

  // mbarrier.arrive
  __device__ void arrive() {
    compiler_fence();
    Hardware::arrive(&word_);
  }

  // mbarrier.arrive.shared::cluster: on the same Mbarrier of the CTA `rank` of the cluster.
  __device__ void arrive_remote(int rank) {
    compiler_fence();
    Hardware::arrive(&word_, rank, 1);
  }

  // mbarrier.arrive.expect_tx: arrives, and makes this phase wait for `bytes` more of asynchronous copies.
  __device__ void arrive_expect_tx(int bytes) {
    compiler_fence();
    Hardware::arrive_and_expect_tx(&word_, bytes);
  }

  // mbarrier.expect_tx: makes this phase wait for `bytes` more, without arriving.
  __device__ void expect_tx(int bytes) { Hardware::expect_transaction(&word_, bytes); }

  // mbarrier.try_wait.parity, once: whether the phase is complete.
  __device__ bool try_wait(Parity parity) {
    const bool happened = Hardware::try_wait(&word_, parity.bit);
    compiler_fence();
    return happened;
  }

  // mbarrier.try_wait.parity until the phase is complete.
  __device__ void wait(Parity parity) {
#ifdef JET_WATCHDOG
    const uint32_t start = watchdog::now();
    while (!Hardware::try_wait(&word_, parity.bit))
      if (watchdog::now() - start > watchdog::kLongestWait)
        watchdog::stop(static_cast<uint32_t>(__cvta_generic_to_shared(&word_)), parity.bit);
#else
    Hardware::wait(&word_, parity.bit);
#endif
    compiler_fence();
  }

  __device__ uint64_t* word() { return &word_; }  // for the copies that complete bytes on it

 private:
  using Hardware = cutlass::arch::ClusterTransactionBarrier;
  uint64_t word_;
};
static_assert(sizeof(Mbarrier) == 8);

// fence.mbarrier_init: makes `Mbarrier::init` visible to other threads of the cluster and to asynchronous copies. A
// block or cluster barrier must follow.
__device__ inline void fence_mbarrier_init() {
  cutlass::arch::fence_barrier_init();
  compiler_fence();
}

// fence.proxy.async: makes this thread's ordinary (generic-proxy) writes to shared memory visible to the asynchronous
// proxy (wgmma operands, TMA stores). It stands between the writes and the barrier that the reader's issuer waits for.
__device__ inline void fence_proxy_async() {
  compiler_fence();
  cutlass::arch::fence_view_async_shared();
  compiler_fence();
}

// bar.sync of `threads` threads on the hardware barrier `id`, 1..15 (0 is __syncthreads). Whole warps only.
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace jet::hopper
