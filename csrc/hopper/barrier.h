// Shared-memory barriers (mbarrier). An Event is named for what has happened when a wait on it returns:
// `weights_loaded`, `stage_read`. It happens again and again; a Parity says which happening is waited for.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

namespace jet::hopper {

// Which of an Event's happenings a wait means: they are numbered from 0, and only odd and even are told apart.
struct Parity {
  uint32_t bit;
  __device__ static Parity first() { return {0}; }  // returns once the event has happened for the first time
  __device__ static Parity past() { return {1}; }   // returns at once on a new Event: "what was before it has happened"
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

// An mbarrier, 8 bytes of shared memory. It happens when as many arrivals as `init` said and all expected bytes have
// come.
class Event {
 public:
  __device__ void init(int arrivals) { Hardware::init(&word_, arrivals); }

  __device__ void arrive() {
    compiler_fence();
    Hardware::arrive(&word_);
  }

  // Arrives on the same Event of the CTA `rank` of the cluster.
  __device__ void arrive_at(int rank) {
    compiler_fence();
    Hardware::arrive(&word_, rank, 1);
  }

  // Arrives, and makes this happening wait for `bytes` more of asynchronous copies.
  __device__ void arrive_and_expect(int bytes) {
    compiler_fence();
    Hardware::arrive_and_expect_tx(&word_, bytes);
  }

  // Makes this happening wait for `bytes` more, without arriving.
  __device__ void expect(int bytes) { Hardware::expect_transaction(&word_, bytes); }

  __device__ bool try_wait(Parity parity) {
    const bool happened = Hardware::try_wait(&word_, parity.bit);
    compiler_fence();
    return happened;
  }

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
static_assert(sizeof(Event) == 8);

// Makes `Event::init` visible to other threads of the cluster and to asynchronous copies. A block or cluster barrier
// must follow.
__device__ inline void publish_inits() {
  cutlass::arch::fence_barrier_init();
  compiler_fence();
}

// Makes this thread's ordinary writes to shared memory visible to the asynchronous proxy (wgmma operands, TMA stores).
// It stands between the writes and the barrier that the reader's issuer waits for.
__device__ inline void publish_writes_to_async_proxy() {
  compiler_fence();
  cutlass::arch::fence_view_async_shared();
  compiler_fence();
}

// bar.sync of `threads` threads on the hardware barrier `id`, 1..15 (0 is __syncthreads). Whole warps only.
__device__ inline void sync_threads(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace jet::hopper
