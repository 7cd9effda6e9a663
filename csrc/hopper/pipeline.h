// A ring of stages between a producer that fills shared memory (usually by TMA) and consumers that read it.
#pragma once

#include "csrc/hopper/barrier.h"

namespace jet::hopper {

// Lives in shared memory. `full[s]` completes when stage s holds data, `empty[s]` when nobody needs them any more.
template <int stages>
struct Ring {
  Mbarrier full[stages], empty[stages];

  // One thread; fence_mbarrier_init() and a barrier follow. `reads`: arrivals that free a stage.
  __device__ void init(int reads) {
    for (int s = 0; s < stages; ++s) {
      full[s].init(1);
      empty[s].init(reads);
    }
  }
};

// A position in the ring: a stage, and which turn.
template <int stages>
struct Cursor {
  int stage = 0;
  Parity parity;
  __device__ explicit Cursor(Parity start) : parity(start) {}
  __device__ void advance() {
    if (++stage == stages) {
      stage = 0;
      parity.next();
    }
  }
  __device__ void skip(int turns) {  // as many advances
    stage += turns;
    while (stage >= stages) {
      stage -= stages;
      parity.next();
    }
  }
};

// The producer's end, held by one thread:  s = acquire(bytes); copies into stage s that complete on full();
// advance().
template <int stages>
class Producer {
 public:
  __device__ explicit Producer(Ring<stages>& ring) : ring_(ring), at_(Parity::past()) {}

  // Waits until the stage is free and announces `bytes`.
  __device__ int acquire(int bytes) {
    ring_.empty[at_.stage].wait(at_.parity);
    ring_.full[at_.stage].arrive_expect_tx(bytes);
    return at_.stage;
  }
  __device__ Mbarrier& full() { return ring_.full[at_.stage]; }
  __device__ void advance() { at_.advance(); }

  // Waits until every stage has been read: with multicast a CTA must not exit while a peer may still arrive on its
  // barriers.
  __device__ void drain() {
    for (int s = 0; s < stages; ++s) {
      ring_.empty[at_.stage].wait(at_.parity);
      at_.advance();
    }
  }

 private:
  Ring<stages>& ring_;
  Cursor<stages> at_;
};

// A consumer's end, held by every consuming thread:  s = wait(); use stage s; advance(). A stage is freed with
// release(stage) by the thread or threads that `Ring::init` counted, when its asynchronous readers are done with it.
template <int stages>
class Consumer {
 public:
  __device__ explicit Consumer(Ring<stages>& ring) : ring_(ring), at_(Parity::first()) {}

  __device__ int wait() {
    ring_.full[at_.stage].wait(at_.parity);
    return at_.stage;
  }
  __device__ void advance() { at_.advance(); }
  // Stages that another consumer takes. The next wait must not come before these have been filled.
  __device__ void skip(int turns) { at_.skip(turns); }
  __device__ void release(int stage) { ring_.empty[stage].arrive(); }
  __device__ void release_remote(int stage, int rank) { ring_.empty[stage].arrive_remote(rank); }
  // By every thread of a warpgroup, for all `cluster` CTAs that multicast into the stage: one arrival at each.
  template <int cluster>
  __device__ void release_all(int stage, int thread) {
    if constexpr (cluster == 1) {
      if (thread == 0) release(stage);
    } else {
      if (thread < cluster) release_remote(stage, thread);
    }
  }

 private:
  Ring<stages>& ring_;
  Cursor<stages> at_;
};

}  // namespace jet::hopper
