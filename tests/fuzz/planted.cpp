// Faults that a sanitizer must report: python -m tests.fuzz --sanitize calls them first, so that silence means
// something. They go the way that the ops go: through the bindings' parallel-for, and in memory from the allocator of
// the CPU code.
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "bindings/torch_parallel.h"

#define JET_PLANTED extern "C" __attribute__((visibility("default"), noinline))

JET_PLANTED long jet_planted_race() {
  volatile long sum = 0;
  const jet::Parallel parallel = jet::bindings::torch_parallel();
  parallel(0, 64, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sum = sum + i;
  });
  return sum;
}

JET_PLANTED long jet_planted_overflow() {
  volatile char* memory = static_cast<char*>(std::aligned_alloc(64, 128));
  volatile long end = 128;
  const long read = memory[end];
  std::free(const_cast<char*>(memory));
  return read;
}

JET_PLANTED long jet_planted_undefined() {
  volatile int32_t largest = INT32_MAX;
  return largest + 1;
}
