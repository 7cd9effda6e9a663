// Which calls the Hopper kernels of the dynamic convolution take; the others are served by the plain path. What they
// take they take in rows: channels contiguous, tokens at one stride that is a multiple of 16 bytes, 16-byte aligned.
#pragma once

#include "csrc/dynamic_conv/inputs.h"

namespace jet {

inline bool apply_dynamic_conv_kernel_takes(const ConvInputs& in) {
  constexpr int64_t int32_end = int64_t{1} << 31;
  const bool dtype = in.x.dtype == Dtype::bf16 || in.x.dtype == Dtype::f16;
  return dtype && in.D % 8 == 0 && in.B * in.T < int32_end && in.N < int32_end;
}

inline bool dynamic_conv_kernel_takes(const ConvInputs& in, const TapGenerator& generator) {
  return apply_dynamic_conv_kernel_takes(in) && generator.R % 8 == 0 && generator.R > 0;
}

inline bool dynamic_conv_step_kernel_takes(const ConvInputs& in, const TapGenerator& generator,
                                           const ConvStatePool& pool) {
  const ConvStateStrides& s = pool.strides;
  const bool rows = s.w == 1 && s.d == in.W - 1 && s.n % 8 == 0 && reinterpret_cast<uintptr_t>(pool.data) % 16 == 0;
  return dynamic_conv_kernel_takes(in, generator) && rows && pool.P < int64_t{1} << 31;
}

}  // namespace jet
