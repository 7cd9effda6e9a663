// Every function that programs of CUDA 12 and 13 may be linked to or look up. Those that the simulator models are
// defined elsewhere and win over the weak ones here, which tell their name and return cudaErrorNotSupported (the
// driver's CUDA_ERROR_NOT_SUPPORTED is the same number). No CUDA header: the declarations would differ.
namespace hoppersim {
int unsupported_runtime_call(const char* name);
int unsupported_driver_call(const char* name);
}  // namespace hoppersim

// Streams order nothing here: the variant for the per-thread default stream is the function itself.
#ifdef __aarch64__
#define JUMP "b "
#define PLT ""
#else
#define JUMP "jmp "
#define PLT "@PLT"
#endif
#define PER_THREAD(name, variant)                                                                          \
  asm(".text\n.globl " #name "_" #variant "\n.type " #name "_" #variant ", %function\n" #name "_" #variant \
      ": " JUMP #name PLT "\n");

#define CALL(name) \
  extern "C" __attribute__((weak)) int name() { return hoppersim::unsupported_runtime_call(#name); }
#include "runtime_names.inc"
#undef CALL

#define CALL(name) \
  extern "C" __attribute__((weak)) int name() { return hoppersim::unsupported_driver_call(#name); }
#include "driver_names.inc"
