// Why an op is served by the plain PyTorch path instead of a kernel of this library.
#pragma once

#include <cstdint>

namespace jet {

enum class PlainReason : int64_t { no_kernel_yet = 0, not_hopper = 1, built_without_cuda = 2, shape = 3, asked = 4 };

inline const char* text(PlainReason reason) {
  switch (reason) {
    case PlainReason::no_kernel_yet: return "this version has no Hopper kernel for it";
    case PlainReason::not_hopper: return "the device is not of compute capability 9.0";
    case PlainReason::built_without_cuda: return "the library was built without nvcc";
    case PlainReason::asked: return "JETKERNELS_BACKEND=plain asks for it";
    case PlainReason::shape: return "no kernel takes this shape or dtype";
  }
  return "unknown";
}

}  // namespace jet
