// The one place that decides which backend serves an op.
#pragma once

#include <optional>

#include "csrc/common/export.h"
#include "csrc/common/plain_reason.h"

namespace jet::bindings {

// For tensors on a CUDA device (or a CPU): nothing if a kernel of this library serves them, else why the plain PyTorch
// path does. JETKERNELS_BACKEND=plain asks for the plain path everywhere.
JET_EXPORT std::optional<PlainReason> plain_reason(bool on_cuda);

}  // namespace jet::bindings
