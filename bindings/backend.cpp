#include "bindings/backend.h"

#include <cstdlib>
#include <cstring>
#include <set>
#include <string>

#include "csrc/hopper/device.h"

namespace jet::bindings {

namespace {

std::set<std::string>& ops_with_kernel() {
  static std::set<std::string> ops;
  return ops;
}

}  // namespace

HasHopperKernel::HasHopperKernel(const char* op) { ops_with_kernel().insert(op); }

bool has_hopper_kernel(const char* op) { return ops_with_kernel().count(op) != 0; }

std::optional<PlainReason> plain_reason(int device, bool has_kernel) {
  static const bool asked = [] {
    const char* backend = std::getenv("JETKERNELS_BACKEND");
    return backend != nullptr && std::strcmp(backend, "plain") == 0;
  }();
  if (asked) return PlainReason::asked;
  if (device == kHost) return std::nullopt;
  if (!has_kernel) return PlainReason::no_kernel_yet;
  if constexpr (kWithCuda) {
    if (hopper::device_facts(device).compute_capability != 90) return PlainReason::not_hopper;
    return std::nullopt;
  }
  return PlainReason::built_without_cuda;
}

}  // namespace jet::bindings
