// What launchers and the choice of a backend ask of a device, and the shared memory of sm_90.
#pragma once

#include <cstddef>

namespace jet::hopper {

// Bytes, as cudaDeviceProp has them on compute capability 9.0.
constexpr int kMaxSharedMemoryPerBlock = 227 * 1024;        // sharedMemPerBlockOptin
constexpr int kSharedMemoryPerMultiprocessor = 228 * 1024;  // sharedMemPerMultiprocessor
constexpr int kReservedSharedMemoryPerBlock = 1024;  // reservedSharedMemPerBlock: the system's, beside a CTA's own

// Whether a multiprocessor has shared memory for so many CTAs.
constexpr bool ctas_fit(std::size_t shared_bytes, int ctas) {
  return (shared_bytes + kReservedSharedMemoryPerBlock) * ctas <= kSharedMemoryPerMultiprocessor;
}

struct DeviceProperties {
  int compute_capability;  // 10 major + minor: 90 is Hopper
  int multiprocessors;
};

// Properties of the CUDA device `device`; asked once per device. Throws std::runtime_error if CUDA knows no such
// device.
const DeviceProperties& device_properties(int device);

// Properties of the current device.
const DeviceProperties& current_device_properties();

}  // namespace jet::hopper
