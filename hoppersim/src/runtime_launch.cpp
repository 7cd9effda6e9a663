// Launches: what the hardware would refuse, then the interpreter.
#include <algorithm>

#include "runtime.h"

namespace hoppersim {

namespace {

constexpr size_t kLaunchesKept = 4096;

// That a thread may have so that `ctas` of so many threads fit.
int most_registers(int threads, int ctas) {
  return std::min(255, kRegistersPerMultiprocessor / ctas / ((threads + 31) / 32 * 32) / 8 * 8);
}

uint64_t volume(const Dim3& d) { return uint64_t{d.x} * d.y * d.z; }

Dim3 from(dim3 d) { return {d.x, d.y, d.z}; }

thread_local std::vector<std::pair<LaunchShape, cudaStream_t>> pushed_configurations;

// The arguments, as the host passes them (one pointer each), laid out as the PTX .param list.
std::vector<uint8_t> gather_parameters(const Function& function, void** arguments) {
  std::vector<uint8_t> bytes(function.parameter_bytes);
  for (size_t i = 0; i < function.parameters.size(); ++i) {
    const Parameter& p = function.parameters[i];
    std::memcpy(bytes.data() + p.offset, arguments[i], p.size);
  }
  return bytes;
}

cudaError_t launch(const void* stub_or_handle, const LaunchShape& shape, void** arguments) {
  Kernel* kernel = find_kernel(stub_or_handle);
  return kernel ? launch_kernel(*kernel, shape, arguments) : set_last_error(cudaErrorInvalidDeviceFunction);
}

// False for an attribute whose effect is not modelled.
bool apply_attribute(const cudaLaunchAttribute& attribute, LaunchShape* shape) {
  switch (attribute.id) {
    case cudaLaunchAttributeClusterDimension: {
      const auto& c = attribute.val.clusterDim;
      if (c.x * c.y * c.z != 0) shape->cluster = Dim3{c.x, c.y, c.z};
      return true;
    }
    case cudaLaunchAttributeCooperative: return shape->cooperative = attribute.val.cooperative != 0, true;
    // These say when and where CTAs run, never what they compute; launches run one after the other here.
    case cudaLaunchAttributeIgnore:
    case cudaLaunchAttributeProgrammaticStreamSerialization:
    case cudaLaunchAttributeClusterSchedulingPolicyPreference:
    case cudaLaunchAttributePriority:
    case cudaLaunchAttributeAccessPolicyWindow:
    case cudaLaunchAttributeMemSyncDomain:
    case cudaLaunchAttributeMemSyncDomainMap:
    case cudaLaunchAttributePreferredSharedMemoryCarveout: return true;
    default: return false;
  }
}

cudaError_t check_cluster(Kernel& kernel, const LaunchShape& shape, Dim3* cluster) {
  const Function& f = kernel.function();
  const bool declared = f.cluster_x != 0;
  const Dim3 required{std::max(1u, f.cluster_x), std::max(1u, f.cluster_y), std::max(1u, f.cluster_z)};
  *cluster = shape.cluster.value_or(required);
  if (declared && (cluster->x != required.x || cluster->y != required.y || cluster->z != required.z))
    return cudaErrorInvalidClusterSize;
  if (volume(*cluster) > (kernel.non_portable_cluster ? kLargestCluster : kPortableCluster))
    return cudaErrorInvalidClusterSize;
  if (shape.grid.x % cluster->x || shape.grid.y % cluster->y || shape.grid.z % cluster->z)
    return cudaErrorInvalidConfiguration;
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_kernel(Kernel& kernel, const LaunchShape& shape, void** arguments) {
  try {
    Dim3 cluster;
    if (const cudaError_t refused = check_launch(kernel, shape, &cluster)) {
      tell_refusal(kernel.function().title, cudaGetErrorName(refused));
      return set_last_error(refused);
    }
    run_kernel(kernel, shape, cluster, gather_parameters(kernel.function(), arguments));
  } catch (Fault& fault) {
    if (fault.report.kernel.empty()) fault.report.kernel = demangled(kernel.name), fault.report.mangled = kernel.name;
    keep_fault(fault);
    return set_last_error(cudaErrorLaunchFailure);
  }
  return cudaSuccess;
}

cudaError_t apply_attributes(const cudaLaunchAttribute* attributes, unsigned count, LaunchShape* shape) {
  for (unsigned i = 0; i < count; ++i)
    if (!apply_attribute(attributes[i], shape))
      return unsupported_call("cudaLaunchKernelEx with attribute", attributes[i].id);
  return cudaSuccess;
}

int Kernel::dynamic_shared_limit() {
  if (largest_dynamic_shared >= 0) return largest_dynamic_shared;
  return std::max(0, kSharedWithoutOptIn - static_cast<int>(function().static_shared));
}

int Kernel::threads_limit() {
  const int declared = static_cast<int>(function().max_threads);
  return declared > 0 ? std::min(declared, kMaxThreadsPerBlock) : kMaxThreadsPerBlock;
}

int Kernel::registers_assumed() {
  if (registers > 0) return registers;
  const int most = most_registers(threads_limit(), static_cast<int>(std::max(1u, function().min_ctas)));
  const int declared = static_cast<int>(function().max_registers);
  return declared > 0 ? std::min(declared, most) : most;
}

cudaError_t check_launch(Kernel& kernel, const LaunchShape& shape, Dim3* cluster) {
  const Dim3 &grid = shape.grid, &block = shape.block;
  if (volume(grid) == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (volume(block) == 0 || block.x > 1024 || block.y > 1024 || block.z > 64 || volume(block) > kMaxThreadsPerBlock)
    return cudaErrorInvalidConfiguration;
  if (static_cast<int>(volume(block)) > kernel.threads_limit()) return cudaErrorInvalidValue;
  if (shape.dynamic_shared > static_cast<size_t>(kernel.dynamic_shared_limit())) return cudaErrorInvalidValue;
  if (kernel.registers > 0 && occupancy(kernel, static_cast<int>(volume(block)), shape.dynamic_shared) == 0)
    return cudaErrorLaunchOutOfResources;
  if (shape.cooperative && volume(grid) > most_resident(kernel, shape)) return cudaErrorCooperativeLaunchTooLarge;
  return check_cluster(kernel, shape, cluster);
}

static int occupancy_with(int registers, Kernel& kernel, int threads, size_t dynamic_shared) {
  if (threads < 1 || threads > kernel.threads_limit()) return 0;
  const int warps = (threads + 31) / 32;
  const int registers_per_warp = (registers + 7) / 8 * 8 * 32;  // allocated in units of 256 per warp
  const int warps_by_registers = kRegistersPerMultiprocessor / 4 / registers_per_warp * 4;  // four partitions
  const int shared = (static_cast<int>(kernel.function().static_shared + dynamic_shared) + 127) / 128 * 128;
  if (shared > kSharedLimit) return 0;
  return std::min({kBlocksPerMultiprocessor, kThreadsPerMultiprocessor / (warps * 32), warps_by_registers / warps,
                   kSharedPerMultiprocessor / (shared + kSharedReservedPerBlock)});
}

int occupancy(Kernel& kernel, int threads, size_t dynamic_shared) {
  return occupancy_with(kernel.registers_assumed(), kernel, threads, dynamic_shared);
}

uint64_t most_resident(Kernel& kernel, const LaunchShape& shape) {
  constexpr int least = 16;  // registers of a thread
  const int registers = kernel.registers > 0 ? kernel.registers : least;
  const int per_multiprocessor =
      occupancy_with(registers, kernel, static_cast<int>(volume(shape.block)), shape.dynamic_shared);
  return static_cast<uint64_t>(per_multiprocessor) * kMultiprocessors;
}

// The registers that the warps start with, for setmaxnreg. Without a declared bound ptxas ignores setmaxnreg; then they
// may have what the multiprocessor has.
static void set_registers(Kernel& kernel, Launch& launch) {
  const Function& f = *launch.function;
  const bool bound = f.max_threads != 0 || f.max_registers != 0;
  const int registers = bound ? kernel.registers_assumed() : most_registers(static_cast<int>(volume(launch.block)), 1);
  launch.registers = static_cast<uint32_t>((registers + 7) / 8 * 8);  // allocated in units of 8
  launch.registers_known = bound && (kernel.registers > 0 || f.max_registers != 0);
}

void run_kernel(Kernel& kernel, const LaunchShape& shape, Dim3 cluster, std::vector<uint8_t> parameters) {
  Runtime& r = runtime();
  std::lock_guard<std::mutex> lock(r.mutex);
  Launch launch;
  launch.function = &kernel.function();
  launch.grid = shape.grid, launch.block = shape.block, launch.cluster = cluster;
  launch.dynamic_shared = static_cast<uint32_t>(shape.dynamic_shared);
  launch.parameters = std::move(parameters);
  launch.options = r.options;
  launch.most_resident = std::max<uint64_t>(1, most_resident(kernel, shape) / volume(cluster));
  launch.cooperative = shape.cooperative;
  LaunchRecord record;
  record.kernel = launch.function->title, record.mangled = kernel.name;
  record.grid = launch.grid, record.block = launch.block, record.cluster = launch.cluster;
  record.static_shared = launch.function->static_shared, record.dynamic_shared = launch.dynamic_shared;
  record.occupancy = occupancy(kernel, static_cast<int>(volume(shape.block)), shape.dynamic_shared);
  record.registers = kernel.registers;
  set_registers(kernel, launch);
  try {
    run(launch);
  } catch (Fault& fault) {
    fault.report.kernel = record.kernel, fault.report.mangled = kernel.name;
    keep_reports(launch.reports, &fault);
    tell_launch(record, false);
    throw;
  }
  keep_reports(launch.reports, nullptr);
  record.counters = std::move(launch.counters);
  tell_launch(record, true);
  r.launches.push_back(std::move(record));
  if (r.launches.size() > kLaunchesKept) r.launches.pop_front();
}

}  // namespace hoppersim

using namespace hoppersim;

extern "C" {

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  pushed_configurations.push_back({LaunchShape{from(grid), from(block), std::nullopt, shared}, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (pushed_configurations.empty()) return set_last_error(cudaErrorMissingConfiguration);
  const auto [shape, handle] = pushed_configurations.back();
  pushed_configurations.pop_back();
  *grid = dim3(shape.grid.x, shape.grid.y, shape.grid.z);
  *block = dim3(shape.block.x, shape.block.y, shape.block.z);
  *shared = shape.dynamic_shared;
  *static_cast<cudaStream_t*>(stream) = handle;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return launch(stub, {from(grid), from(block), std::nullopt, shared}, arguments);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch(kernel, {from(grid), from(block), std::nullopt, shared}, arguments);
}

cudaError_t cudaLaunchCooperativeKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared,
                                        cudaStream_t) {
  return launch(stub, {from(grid), from(block), std::nullopt, shared, true}, arguments);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  LaunchShape shape{from(config->gridDim), from(config->blockDim), std::nullopt, config->dynamicSmemBytes};
  if (const cudaError_t error = apply_attributes(config->attrs, config->numAttrs, &shape)) return error;
  return launch(stub, shape, arguments);
}

}  // extern "C"
