// Attributes and occupancy of kernels.
#include <algorithm>

#include "runtime.h"

namespace hoppersim {

namespace {

// Calls `use(kernel)` for a registered kernel; a module that does not parse is an invalid image, as on hardware.
template <class Use>
cudaError_t with_kernel(const void* stub, Use use) {
  Kernel* kernel = find_kernel(stub);
  if (kernel == nullptr) return set_last_error(cudaErrorInvalidDeviceFunction);
  try {
    return set_last_error(use(*kernel));
  } catch (const Fault& fault) {
    keep_fault(fault);
    return set_last_error(cudaErrorInvalidKernelImage);
  }
}

cudaError_t get_attributes(Kernel& kernel, cudaFuncAttributes* a) {
  const Function& f = kernel.function();
  *a = cudaFuncAttributes{};
  a->sharedSizeBytes = f.static_shared;
  a->localSizeBytes = f.local_bytes;
  a->maxThreadsPerBlock = kernel.threads_limit();
  a->numRegs = kernel.registers_assumed();
  a->ptxVersion = a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = kernel.dynamic_shared_limit();
  a->clusterDimMustBeSet = 0;
  a->requiredClusterWidth = static_cast<int>(f.cluster_x);
  a->requiredClusterHeight = static_cast<int>(f.cluster_y);
  a->requiredClusterDepth = static_cast<int>(f.cluster_z);
  a->nonPortableClusterSizeAllowed = kernel.non_portable_cluster;
  return cudaSuccess;
}

cudaError_t clusters_that_fit(Kernel& kernel, const cudaLaunchConfig_t& config, int* count) {
  unsigned ctas = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& c = config.attrs[i].val.clusterDim;
      ctas = c.x * c.y * c.z;
    }
  if (ctas == 0 || ctas > (kernel.non_portable_cluster ? kLargestCluster : kPortableCluster))
    return cudaErrorInvalidClusterSize;
  const int threads = static_cast<int>(config.blockDim.x * config.blockDim.y * config.blockDim.z);
  const int per_group = occupancy(kernel, threads, config.dynamicSmemBytes) * kMultiprocessorsPerCluster;
  *count = per_group / static_cast<int>(ctas) * (kMultiprocessors / kMultiprocessorsPerCluster);
  return cudaSuccess;
}

}  // namespace

cudaError_t set_attribute(Kernel& kernel, cudaFuncAttribute attribute, int value) {
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || value > kSharedLimit - static_cast<int>(kernel.function().static_shared))
        return cudaErrorInvalidValue;
      kernel.largest_dynamic_shared = value;
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed: return kernel.non_portable_cluster = value != 0, cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout:
    case cudaFuncAttributeClusterSchedulingPolicyPreference: return cudaSuccess;  // hints
    default: return unsupported_call("cudaFuncSetAttribute of attribute", attribute);
  }
}

}  // namespace hoppersim

using namespace hoppersim;

extern "C" {

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  return with_kernel(stub, [&](Kernel& k) { return set_attribute(k, attribute, value); });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  return with_kernel(stub, [&](Kernel& k) { return get_attributes(k, attributes); });
}

cudaError_t cudaFuncGetName(const char** name, const void* stub) {
  return with_kernel(stub, [&](Kernel& k) { return *name = k.name.c_str(), cudaSuccess; });
}

cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* stub, int threads,
                                                                   size_t shared, unsigned) {
  return with_kernel(stub, [&](Kernel& k) { return *blocks = occupancy(k, threads, shared), cudaSuccess; });
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* stub, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, threads, shared, 0);
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* stub, const cudaLaunchConfig_t* config) {
  return with_kernel(stub, [&](Kernel& k) { return clusters_that_fit(k, *config, clusters); });
}

cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, const void* stub, const cudaLaunchConfig_t*) {
  return with_kernel(stub, [&](Kernel& k) {
    return *size = static_cast<int>(k.non_portable_cluster ? kLargestCluster : kPortableCluster), cudaSuccess;
  });
}

}  // extern "C"
