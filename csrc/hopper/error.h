// Host side: what a launcher does when CUDA refuses. Device side: nothing; a kernel that cannot go on traps.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace jet::hopper {

// Throws std::runtime_error "<what>: <CUDA's name>: <CUDA's text>" unless `status` is cudaSuccess.
inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // forgets it: the next user of the runtime must not take it for their own
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

// Throws std::runtime_error "<what>: <argument> must be <expected>, got <got>" unless `holds`.
inline void require(bool holds, const char* what, const std::string& argument, const std::string& expected,
                    long long got) {
  if (holds) return;
  throw std::runtime_error(std::string(what) + ": " + argument + " must be " + expected + ", got " +
                           std::to_string(got));
}

}  // namespace jet::hopper
