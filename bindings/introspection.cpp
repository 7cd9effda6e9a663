// What was built, as C functions: jetkernels/_library.py calls them with ctypes, so that one library serves every
// Python. Texts live as long as the library.
#include <string>

#include "bindings/backend.h"
#include "build_facts.h"
#include "csrc/common/plain_reason.h"
#include "csrc/cpu/isa.h"

// One JSON object: torch, compiler, cpu_isas, cuda_architectures, cpu_isa, the one in use, and whether that uses AMX.
JET_C_FUNCTION const char* jetkernels_build_info() {
  static const std::string info = [] {
    std::string text = "{";
    text += JET_BUILD_FACTS;
    text += ", \"cpu_isa\": \"";
    text += jet::cpu::isa_name(jet::cpu::active_isa());
    text += "\", \"cpu_amx\": ";
    return text += jet::cpu::amx_bf16_is_active() ? "true}" : "false}";
  }();
  return info.c_str();
}

// The reason that the bindings pass to the plain PyTorch path, as text.
JET_C_FUNCTION const char* jetkernels_plain_reason_text(int64_t code) {
  return jet::text(static_cast<jet::PlainReason>(code));
}
