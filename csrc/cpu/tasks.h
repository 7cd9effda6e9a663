// Scratch memory and the distribution of tasks among workers.
#pragma once

#include <cstdlib>
#include <new>

#include "csrc/common/parallel.h"
#include "csrc/cpu/simd.h"

namespace jet::cpu::JET_CPU_ISA {

// `count` elements on cache lines of their own, not initialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(long count)
      : data_(static_cast<T*>(std::aligned_alloc(64, round_up(larger(count, 1) * long(sizeof(T)), 64)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

// Takes arrays from a block one after the other; with a null block it only counts the bytes.
class Carver {
 public:
  explicit Carver(char* block) : block_(block) {}
  template <class T>
  T* take(long count) {
    T* array = block_ == nullptr ? nullptr : reinterpret_cast<T*>(block_ + used_);
    used_ += round_up(count * long(sizeof(T)), 64);
    return array;
  }
  long used() const { return used_; }

 private:
  char* block_;
  long used_ = 0;
};

// A block for each worker, each on pages of its own.
class Scratch {
 public:
  Scratch(long workers, long bytes) : bytes_(round_up(bytes, 4096) + 64), memory_(workers * bytes_) {}
  char* of(long worker) const { return memory_.get() + worker * bytes_; }

 private:
  long bytes_;
  Buffer<char> memory_;
};

// Multiply-adds below which the caller's thread works alone. It does about 10 in a nanosecond, and these take it 13 us.
// To wake a second thread that sleeps costs 5 to 40 us, and on a busy machine the loop then waits until that thread
// gets a processor. (A thread that still spins joins in 1 us; at most half of the 13 us is lost where it does.)
#ifdef JET_WAKE_FOR_ANY_WORK  // where ThreadSanitizer watches small cases
constexpr double kWorthWaking = 0;
#else
constexpr double kWorthWaking = 1 << 17;
#endif

// How to run loops of about so many multiply-adds in all. What they compute does not depend on who runs them.
inline Parallel for_work(const Parallel& parallel, double multiply_adds) {
  if (multiply_adds >= kWorthWaking) return parallel;
  return {[](int64_t begin, int64_t end, int64_t, Parallel::Body body, void* context) { body(begin, end, context); },
          1};
}

// f(worker, task) for every task. Tasks of one worker run one after another, so a worker can own scratch memory; it
// takes the next free task, which changes who computes a result and never the result.
template <class F>
inline void run_tasks(const Parallel& parallel, long workers, long tasks, const F& f) {
  long next = 0;
  parallel(0, smaller(workers, tasks), 1, [&](int64_t begin, int64_t end) {
    for (long worker = begin; worker < end; ++worker)
      for (long task; (task = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) f(worker, task);
  });
}

// The same for tasks of equal cost: a worker always gets the same tasks, so that what it wrote in one call is still in
// its core's cache in the next. Handing tasks out one by one made decode at batch 8 take 115 us or 320 us, by chance.
template <class F>
inline void run_even_tasks(const Parallel& parallel, long workers, long tasks, const F& f) {
  parallel(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (long worker = begin; worker < end; ++worker)
      for (long task = tasks * worker / workers; task < tasks * (worker + 1) / workers; ++task) f(worker, task);
  });
}

}  // namespace jet::cpu::JET_CPU_ISA
