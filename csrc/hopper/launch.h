// Launches of kernels with dynamic shared memory, thread block clusters and programmatic dependent launch (PDL).
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "csrc/hopper/device.h"
#include "csrc/hopper/error.h"

namespace jet::hopper {

struct LaunchShape {
  dim3 grid;
  int threads = 128;
  int shared_bytes = 0;       // dynamic
  int cluster = 1;            // CTAs along x; divides grid.x
  bool programmatic = false;  // programmatic dependent launch: may begin before the kernel that stands before it on
                              // the stream has ended; it calls griddepcontrol_wait()
};

// griddepcontrol.wait: a kernel launched `programmatic` calls it in every CTA before it reads or writes anything that
// another kernel of the stream may touch; when it returns, the kernels before have ended and their writes are visible.
__device__ inline void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// griddepcontrol.launch_dependents: the next kernel of the stream, if `programmatic`, may start once every CTA of this
// one has called it or has ended.
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
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedMemoryPerBlock), what);
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
