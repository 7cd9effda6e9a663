// The dynamic convolution with explicit taps (the equations of prefill/dynamic_conv.h without the generator). `taps` is
// the op's argument `kernels`.
//
//   z[b,t,d] = sum_w taps[b,t,d,w] * input(n, p-(W-1)+w)[d]      y = silu(z) or z
#pragma once

#include "csrc/common/parallel.h"
#include "csrc/dynamic_conv/inputs.h"

namespace jet {

struct ApplyDynamicConvParams {
  ConvInputs in;
  const void* taps;      // [B, T, D, W] contiguous
  void* y;               // [B, T, D] contiguous
  void* conv_state_out;  // [N, D, W-1] contiguous
};

struct ApplyDynamicConvBackwardParams {
  ConvInputs in;
  const void* taps;                 // [B, T, D, W] contiguous
  TokenTensor grad_y;               // [B, T, D]
  const void* grad_conv_state_out;  // [N, D, W-1] contiguous, or null: zeros
  void* dx;                         // [B, T, D] contiguous
  void* dtaps;                      // [B, T, D, W] contiguous
  void* dconv_state;                // [N, D, W-1] contiguous
};

// On the current CUDA device, of compute capability 9.0, in `stream` (a cudaStream_t). The params must satisfy
// apply_dynamic_conv_kernel_takes.
void apply_dynamic_conv_hopper(const ApplyDynamicConvParams& params, void* stream);
void apply_dynamic_conv_backward_hopper(const ApplyDynamicConvBackwardParams& params, void* stream);

void apply_dynamic_conv_cpu(const ApplyDynamicConvParams& params, const Parallel& parallel);
void apply_dynamic_conv_backward_cpu(const ApplyDynamicConvBackwardParams& params, const Parallel& parallel);

}  // namespace jet
