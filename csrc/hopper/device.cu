#include "csrc/hopper/device.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "csrc/hopper/error.h"

namespace jet::hopper {

namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "device facts");
  return value;
}

}  // namespace

const DeviceFacts& device_facts(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceFacts> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const int capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, device) + attribute(cudaDevAttrComputeCapabilityMinor, device);
  return known.emplace(device, DeviceFacts{capability, attribute(cudaDevAttrMultiProcessorCount, device)})
      .first->second;
}

const DeviceFacts& current_device_facts() {
  int device = 0;
  check(cudaGetDevice(&device), "device facts");
  return device_facts(device);
}

}  // namespace jet::hopper
