#include "csrc/cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace jet::cpu {

namespace {

Isa best_isa() {
#if defined(__x86_64__)
  // The variants are compiled for x86-64-v3 and x86-64-v4; these are the features that decide.
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return Isa::avx2;
#endif
  return Isa::generic;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("JETKERNELS_CPU_ISA");
  if (wanted == nullptr) return best;
  for (Isa isa : {Isa::generic, Isa::avx2, Isa::avx512})
    if (std::strcmp(wanted, isa_name(isa)) == 0 && isa <= best) return isa;
  return best;
}

bool may_use_amx_bf16() {
#if defined(__x86_64__) && defined(__linux__)
  if (best_isa() != Isa::avx512 || std::getenv("JETKERNELS_CPU_ISA") != nullptr) return false;
  if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16")) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

bool amx_bf16_is_active() {
  static const bool active = may_use_amx_bf16();
  return active;
}

bool amx_int8_is_active() {
#if defined(__x86_64__)
  return amx_bf16_is_active() && __builtin_cpu_supports("amx-int8");
#else
  return false;
#endif
}

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    case Isa::generic: return "generic";
  }
  return "unknown";
}

}  // namespace jet::cpu
