// An empty kernel: the floor that every launch pays. Benchmarks subtract it.
#include <cuda_runtime.h>

namespace jet::hopper {

__global__ void empty_kernel() {}

// Launches it as `<<<1, 32>>>` on `stream` (a cudaStream_t) and returns the launch's cudaError_t. For
// jetkernels/_library.py.
extern "C" __attribute__((visibility("default"))) int jetkernels_empty_launch(void* stream) {
  empty_kernel<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>();
  return static_cast<int>(cudaGetLastError());
}

}  // namespace jet::hopper
