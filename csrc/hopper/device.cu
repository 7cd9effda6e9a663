#include "csrc/hopper/device.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "csrc/hopper/error.h"

namespace jet::hopper {

namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "device properties");
  return value;
}

}  // namespace

const DeviceProperties& device_properties(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceProperties> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  return known.emplace(device, DeviceProperties{capability, attribute(cudaDevAttrMultiProcessorCount, device)})
      .first->second;
}

const DeviceProperties& current_device_properties() {
  int device = 0;
  check(cudaGetDevice(&device), "device properties");
  return device_properties(device);
}

}  // namespace jet::hopper
