#include "csrc/cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

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

}  // namespace

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
