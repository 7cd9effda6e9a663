// What launchers and the choice of a backend ask of a device.
#pragma once

namespace jet::hopper {

struct DeviceFacts {
  int compute_capability;  // 10 major + minor: 90 is Hopper
  int multiprocessors;
};

// Of the CUDA device `device`; asked once per device. Throws std::runtime_error if CUDA knows no such device.
const DeviceFacts& device_facts(int device);

// Of the current device.
const DeviceFacts& current_device_facts();

}  // namespace jet::hopper
