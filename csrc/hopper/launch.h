// Host side: one way to launch a kernel, with its shared memory and its cluster.
#pragma once

#include <cuda_runtime.h>

#include "csrc/hopper/error.h"

namespace jet::hopper {

struct LaunchShape {
  dim3 grid;
  int threads = 128;
  int shared_bytes = 0;  // dynamic
  int cluster = 1;       // CTAs along x; divides grid.x
};

// Launches kernel(arguments...) on `stream`. `what` names the op in the text of an error.
template <class... Parameters, class... Arguments>
void launch(const char* what, const LaunchShape& shape, cudaStream_t stream, void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (shape.shared_bytes > 0)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes), what);
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

}  // namespace jet::hopper
