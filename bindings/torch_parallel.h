// torch's thread pool, as the CPU code takes it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "csrc/common/parallel.h"

namespace jet::bindings {

inline Parallel torch_parallel() {
  const Parallel::For run = [](int64_t begin, int64_t end, int64_t grain, Parallel::Body body, void* context) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
  };
  return {run, static_cast<int64_t>(torch::stable::get_num_threads())};
}

}  // namespace jet::bindings
