#include "bindings/backend.h"

#include <cstdlib>
#include <cstring>

namespace jet::bindings {

std::optional<PlainReason> plain_reason(bool on_cuda) {
  static const bool asked = [] {
    const char* backend = std::getenv("JETKERNELS_BACKEND");
    return backend != nullptr && std::strcmp(backend, "plain") == 0;
  }();
  if (asked) return PlainReason::asked;
  if (on_cuda) return PlainReason::no_kernel_yet;
  return std::nullopt;
}

}  // namespace jet::bindings
