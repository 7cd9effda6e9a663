// The one place that decides which backend serves a call.
#pragma once

#include <optional>

#include "csrc/common/plain_reason.h"

// A function of the library for C and ctypes; everything else is hidden.
#define JET_C_FUNCTION extern "C" __attribute__((visibility("default")))

namespace jet::bindings {

#ifdef JET_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;  // launchers are not linked: calls of them stand behind `if constexpr (kWithCuda)`
#endif

constexpr int kHost = -1;  // the "device" of tensors that are not on one

// Why the plain PyTorch path serves a call; nothing if code of this library does. JETKERNELS_BACKEND=plain asks for the
// plain path everywhere. An op asks once per call, after its checks, before it writes anything and before its outputs
// are made: jetkernels.backend_of (backend.cpp) hears the answer here, and then the call ends here, with an exception.

// For an op with a Hopper kernel. `takes`: whether that kernel takes the call's shapes and dtypes; `host_takes`:
// whether the CPU code does.
std::optional<PlainReason> plain_reason_of_call(int device, bool takes, bool host_takes = true);

// For an op without a Hopper kernel, whose CPU code takes every call.
std::optional<PlainReason> plain_reason_without_kernel(int device);

}  // namespace jet::bindings
