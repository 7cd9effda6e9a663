// What was built and which backend serves which op, as C functions: jetkernels/_library.py calls them with ctypes, so
// that one library serves every Python. Texts live as long as the library.
#include <exception>
#include <string>

#include "bindings/backend.h"
#include "build_facts.h"
#include "csrc/common/plain_reason.h"
#include "csrc/cpu/isa.h"

#define JET_C_FUNCTION extern "C" __attribute__((visibility("default")))  // everything else in the library is hidden

// One JSON object: torch, compiler, cpu_isas, cuda_architectures, and cpu_isa, the one in use.
JET_C_FUNCTION const char* jetkernels_build_info() {
  static const std::string info =
      std::string("{") + JET_BUILD_FACTS + ", \"cpu_isa\": \"" + jet::cpu::isa_name(jet::cpu::active_isa()) + "\"}";
  return info.c_str();
}

// The reason that the bindings pass to the plain PyTorch path, as text.
JET_C_FUNCTION const char* jetkernels_plain_reason_text(int64_t code) {
  return jet::text(static_cast<jet::PlainReason>(code));
}

// Why the plain PyTorch path serves `op` on a CUDA device (-1: on a CPU); null if a kernel does.
JET_C_FUNCTION const char* jetkernels_plain_reason(const char* op, int device) {
  try {
    const auto reason = jet::bindings::plain_reason(device, jet::bindings::has_hopper_kernel(op));
    return reason ? jet::text(*reason) : nullptr;
  } catch (const std::exception& error) {  // of the CUDA runtime
    static thread_local std::string said;
    said = error.what();
    return said.c_str();
  }
}
