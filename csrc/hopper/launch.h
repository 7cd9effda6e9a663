// Host side: one way to launch a kernel, with its shared memory and its cluster.
#pragma once

#include <cuda_runtime.h>

#include "csrc/hopper/error.h"

namespace jet::hopper {

constexpr int kMostSharedBytes = 227 * 1024;  // of a CTA

struct LaunchShape {
  dim3 grid;
  int threads = 128;
  int shared_bytes = 0;       // dynamic
  int cluster = 1;            // CTAs along x; divides grid.x
  bool programmatic = false;  // may begin before the kernel that stands before it on the stream has ended: it calls
                              // griddepcontrol_wait()
};

// The two halves of programmatic dependent launch. A kernel launched `programmatic` calls the first in every CTA before
// it reads or writes anything that another kernel of the stream may touch; when it returns, the kernels before have
// ended and their writes are visible. The kernel before it may call the second, in every CTA, when all of its CTAs run
// or have run: until then nothing of the next one starts.
__device__ inline void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ inline void griddepcontrol_launch_dependents() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Launches kernel(arguments...) on `stream`. `what` names the op in the text of an error.
template <class... Parameters, class... Arguments>
void launch(const char* what, const LaunchShape& shape, cudaStream_t stream, void (*kernel)(Parameters...),
            Arguments&&... arguments) {
  if (shape.shared_bytes > 0) {
    const auto* const function = reinterpret_cast<const void*>(kernel);
    // The limit belongs to the kernel and not to this launch: a smaller one would make the launch of another thread
    // fail.
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostSharedBytes), what);
    // Else the driver may leave room for fewer CTAs than fit.
    check(
        cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        what);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (shape.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  if (shape.programmatic) {
    cudaLaunchAttribute& programmatic = attributes[config.numAttrs++];
    programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    programmatic.val.programmaticStreamSerializationAllowed = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

}  // namespace jet::hopper
