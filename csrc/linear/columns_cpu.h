// The columns of x and W as the steps of a product's inner loop, the workers' shares of the rows of W, and the outputs.
#pragma once

#include "csrc/cpu/elements.h"
#include "csrc/cpu/tasks.h"
#include "csrc/linear/linear.h"

namespace jet::cpu::JET_CPU_ISA {

constexpr double kCopy = 4;  // multiply-adds that take the time of copying a number
constexpr long kBlock = 16;  // rows of W that a worker streams side by side; a prefetcher of the CPU follows each

// Groups of columns, each in whole steps of `width` columns. Where a group has no more columns, x and W are zero.
struct Columns {
  Columns(const LinearParams& p, long width)
      : groups(p.G),
        group(p.C / p.G),
        width(width),
        whole_steps(group / width),
        group_steps((group + width - 1) / width) {}

  long steps() const { return groups * group_steps; }

  // f(first column, columns, step) for the steps of group g. The number of columns is `width`, but for the last step.
  template <class F>
  JET_INLINE void for_steps(long g, const F& f) const {
    const long column = g * group, step = g * group_steps;
    for (long s = 0; s < whole_steps; ++s) f(column + s * width, width, step + s);
    if (whole_steps < group_steps) f(column + whole_steps * width, group - whole_steps * width, step + whole_steps);
  }

  long groups, group, width, whole_steps, group_steps;
};

// f(p) for the first row of every block of W. The blocks of a worker follow each other in memory.
template <class F>
void run_blocks(const LinearParams& p, const Parallel& parallel, const F& f) {
  run_even_tasks(parallel, larger(1, parallel.threads), (p.P + kBlock - 1) / kBlock,
                 [&](long, long block) { f(block * kBlock); });
}

// y(n, p0 ..) = sums [kBlock] + bias for the rows of W in the block at p0.
template <class T>
JET_INLINE void store_outputs(const LinearParams& p, long n, long p0, const Arithmetic<T>* sums) {
  T* y = static_cast<T*>(p.y) + n * p.P + p0;
  const T* bias = static_cast<const T*>(p.bias);
  const long count = smaller(kBlock, p.P - p0);
  for (long i = 0; i < count; i += kLanes<T>) {
    const Vector<Arithmetic<T>> sum = Simd<Arithmetic<T>>::load(sums + i);
    store_some(y + i, 1, count - i, bias == nullptr ? sum : sum + load_some(bias + p0 + i, 1, count - i));
  }
}

}  // namespace jet::cpu::JET_CPU_ISA
