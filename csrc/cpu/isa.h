// Every *_cpu.cpp is compiled once per instruction set, with JET_CPU_ISA naming the set and the namespace:
//
//   namespace jet::cpu::JET_CPU_ISA { void f_cpu(const FParams& p, const Parallel& parallel) { ... } }
//   JET_CPU_LAUNCHER(f_cpu, FParams, params.dtype)
//
// JET_CPU_LAUNCHER defines jet::f_cpu, which picks the best variant this machine can run. JETKERNELS_CPU_ISA
// (generic, avx2 or avx512) lowers the choice, so that each variant can be tested on one machine. A build with
// JET_CPU_GENERIC_ONLY has the generic variant alone.
//
// fp64, which gradients are checked in, has no AVX-512 variant (an eighth of the build): such machines run the AVX2
// one. What only it needs stands in JET_CPU_FP64(call).
#pragma once

#include "csrc/common/dtype.h"
#include "csrc/common/parallel.h"

namespace jet::cpu {

enum class Isa { generic, avx2, avx512 };

Isa active_isa();
const char* isa_name(Isa isa);

// Whether the avx512 variants may use AMX (csrc/cpu/amx.h): the CPU has its bf16 products, the kernel lets this process
// use the tile registers, and JETKERNELS_CPU_ISA is not set.
bool amx_bf16_is_active();
bool amx_int8_is_active();  // and its int8 products

inline Isa active_isa(Dtype dtype) {
  return dtype == Dtype::f64 && active_isa() == Isa::avx512 ? Isa::avx2 : active_isa();
}

}  // namespace jet::cpu

#if defined(__AVX512F__)
#define JET_CPU_FP64(...) __builtin_trap()
#else
#define JET_CPU_FP64(...) return __VA_ARGS__
#endif

#define JET_CPU_CONCAT_(a, b) a##b
#define JET_CPU_CONCAT(a, b) JET_CPU_CONCAT_(a, b)

#if defined(__x86_64__) && !defined(JET_CPU_GENERIC_ONLY)
#define JET_CPU_LAUNCHER_generic(function, Params, dtype)                      \
  namespace jet::cpu::avx2 {                                                   \
  void function(const Params&, const Parallel&);                               \
  }                                                                            \
  namespace jet::cpu::avx512 {                                                 \
  void function(const Params&, const Parallel&);                               \
  }                                                                            \
  namespace jet {                                                              \
  void function(const Params& params, const Parallel& parallel) {              \
    switch (cpu::active_isa(dtype)) {                                          \
      case cpu::Isa::avx512: return cpu::avx512::function(params, parallel);   \
      case cpu::Isa::avx2: return cpu::avx2::function(params, parallel);       \
      case cpu::Isa::generic: return cpu::generic::function(params, parallel); \
    }                                                                          \
  }                                                                            \
  }
#else
#define JET_CPU_LAUNCHER_generic(function, Params, dtype)                                                     \
  namespace jet {                                                                                             \
  void function(const Params& params, const Parallel& parallel) { cpu::generic::function(params, parallel); } \
  }
#endif
#define JET_CPU_LAUNCHER_avx2(function, Params, dtype)
#define JET_CPU_LAUNCHER_avx512(function, Params, dtype)
#define JET_CPU_LAUNCHER(function, Params, dtype) \
  JET_CPU_CONCAT(JET_CPU_LAUNCHER_, JET_CPU_ISA)(function, Params, dtype)
