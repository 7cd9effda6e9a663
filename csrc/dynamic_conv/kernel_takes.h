// Which calls the Hopper kernels of the dynamic convolution take; the others are served by the plain path. What they
// take they take in rows: elements contiguous, rows (tokens) at one stride that is a multiple of 16 bytes, 16-byte
// aligned.
#pragma once

#include "csrc/dynamic_conv/apply/apply_dynamic_conv.h"
#include "csrc/dynamic_conv/prefill/dynamic_conv.h"
#include "csrc/dynamic_conv/step/dynamic_conv_step.h"

namespace jet {

inline bool conv_kernel_takes(Dtype dtype, int64_t tokens, int64_t D, int64_t states) {
  constexpr int64_t int32_end = int64_t{1} << 31;
  return (dtype == Dtype::bf16 || dtype == Dtype::f16) && D % 8 == 0 && tokens < int32_end && states < int32_end;
}

inline bool dynamic_conv_kernel_takes(const DynamicConvParams& p) {
  return conv_kernel_takes(p.in.dtype, p.in.B * p.in.T, p.in.D, p.in.N) && p.R % 8 == 0 && p.R > 0;
}
inline bool dynamic_conv_kernel_takes(const DynamicConvStepParams& p) {
  const bool state = p.state_stride[2] == 1 && p.state_stride[1] == p.W - 1 && p.state_stride[0] % 8 == 0 &&
                     reinterpret_cast<uintptr_t>(p.conv_state) % 16 == 0;
  return conv_kernel_takes(p.dtype, p.N, p.D, p.P) && p.R % 8 == 0 && p.R > 0 && state;
}
inline bool dynamic_conv_kernel_takes(const ApplyDynamicConvParams& p) {
  return conv_kernel_takes(p.in.dtype, p.in.B * p.in.T, p.in.D, p.in.N);
}

}  // namespace jet
