// The one place that decides which backend serves an op.
#pragma once

#include <optional>

#include "csrc/common/plain_reason.h"

namespace jet::bindings {

#ifdef JET_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;  // launchers are not linked: calls of them stand behind `if constexpr (kWithCuda)`
#endif

constexpr int kHost = -1;  // the "device" of tensors that are not on one

// Why the plain PyTorch path serves tensors on a CUDA device (or kHost); nothing if a kernel of this library does.
// JETKERNELS_BACKEND=plain asks for the plain path everywhere. `has_kernel`: whether the op has a Hopper kernel at all.
std::optional<PlainReason> plain_reason(int device, bool has_kernel);

// The same for one call; `takes`: whether the Hopper kernel takes its shapes and dtypes.
inline std::optional<PlainReason> plain_reason_of_call(int device, bool takes) {
  const auto reason = plain_reason(device, true);
  if (reason || device == kHost || takes) return reason;
  return PlainReason::shape;
}

// A static object of this type beside an op's registration says that the op has a Hopper kernel.
struct HasHopperKernel {
  explicit HasHopperKernel(const char* op);
};
bool has_hopper_kernel(const char* op);

}  // namespace jet::bindings
