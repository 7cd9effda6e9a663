// torch's parallel-for and its number of threads, on std::thread: linked into the library that ThreadSanitizer watches.
//
// torch runs a parallel-for on libgomp, which is not instrumented: ThreadSanitizer does not see how it starts and joins
// its threads and takes everything that a loop body reads for a race. std::thread it sees, so what it reports here is
// ours. One thread for each piece, and a piece for each thread that the caller may count on, however small: more races
// than torch has.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace {

std::atomic<uint32_t> thread_count{1};
thread_local bool inside = false;

}  // namespace

// Called by tests/fuzz in place of torch.set_num_threads: torch itself keeps one thread.
extern "C" __attribute__((visibility("default"))) void jet_fuzz_set_num_threads(uint32_t threads) {
  thread_count = threads;
}

extern "C" AOTITorchError torch_get_num_threads(uint32_t* out_num_threads) {
  *out_num_threads = inside ? 1 : thread_count.load();
  return 0;
}

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func,
                                             void* ctx) {
  if (begin >= end) return 0;
  const int64_t pieces =
      inside ? 1 : std::min<int64_t>(thread_count, (end - begin - 1) / std::max<int64_t>(grain_size, 1) + 1);
  const auto run = [&](int64_t i) {
    const bool nested = inside;
    inside = true;
    func(begin + (end - begin) * i / pieces, begin + (end - begin) * (i + 1) / pieces, ctx);
    inside = nested;
  };
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < pieces; ++i) threads.emplace_back(run, i);
  run(0);
  for (std::thread& thread : threads) thread.join();
  return 0;
}
