// A ring of stages (circular buffer) between a producer that fills shared memory, usually by TMA, and consumers that
// read it. The names are those of CUTLASS's pipelines.
#pragma once

#include "csrc/hopper/barrier.h"

namespace jet::hopper {

// Lives in shared memory. `full[s]` completes a phase when stage s holds data, `empty[s]` when all have read it.
template <int stages>
struct Ring {
  Mbarrier full[stages], empty[stages];

  // By one thread; fence_mbarrier_init() and a barrier follow. `releases`: arrivals that free a stage.
  __device__ void init(int releases) {
    for (int s = 0; s < stages; ++s) {
      full[s].init(1);
      empty[s].init(releases);
    }
  }
};

// A position in the ring: a stage, and the parity of the phase that its barriers are in.
template <int stages>
struct PipelineState {
  int stage = 0;
  PhaseParity parity;
  __device__ explicit PipelineState(PhaseParity start) : parity(start) {}
  __device__ void advance() {
    if (++stage == stages) {
      stage = 0;
      parity.flip();
    }
  }
  __device__ void advance(int n) {
    stage += n;
    while (stage >= stages) {
      stage -= stages;
      parity.flip();
    }
  }
};

// The producer's end, held by one thread:  s = acquire(bytes); copies into stage s that complete on full();
// advance().
template <int stages>
class Producer {
 public:
  __device__ explicit Producer(Ring<stages>& ring) : ring_(ring), at_(PhaseParity::preceding()) {}

  // Waits until the stage is empty, then has `full` expect `bytes`.
  __device__ int acquire(int bytes) {
    ring_.empty[at_.stage].wait(at_.parity);
    ring_.full[at_.stage].arrive_expect_tx(bytes);
    return at_.stage;
  }
  __device__ Mbarrier& full() { return ring_.full[at_.stage]; }
  __device__ void advance() { at_.advance(); }

 private:
  Ring<stages>& ring_;
  PipelineState<stages> at_;
};

// A consumer's end, held by every consuming thread:  s = wait(); use stage s; advance(). A stage is released, by the
// thread or threads that `Ring::init` counted, when its asynchronous readers are done with it.
template <int stages>
class Consumer {
 public:
  __device__ explicit Consumer(Ring<stages>& ring) : ring_(ring), at_(PhaseParity::first()) {}

  __device__ int wait() {
    ring_.full[at_.stage].wait(at_.parity);
    return at_.stage;
  }
  __device__ void advance() { at_.advance(); }
  // Past n stages that another consumer takes. The next wait must not come before these have been filled.
  __device__ void advance(int n) { at_.advance(n); }
  __device__ void release(int stage) { ring_.empty[stage].arrive(); }
  // Called by every thread of a warpgroup: one arrival at each of the `cluster` CTAs that multicast into the stage.
  template <int cluster>
  __device__ void release_all(int stage, int thread) {
    if constexpr (cluster == 1) {
      if (thread == 0) release(stage);
    } else {
      if (thread < cluster) ring_.empty[stage].arrive_remote(thread);
    }
  }

 private:
  Ring<stages>& ring_;
  PipelineState<stages> at_;
};

}  // namespace jet::hopper
