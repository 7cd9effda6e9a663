// The dynamic convolution with explicit kernels (the equations of dynamic_conv.h without the generator):
//
//   z[b,t,d] = sum_w kernels[b,t,d,w] * input(n, p-(W-1)+w)      y = silu(z) or z
#pragma once

#include "csrc/common/parallel.h"
#include "csrc/dynamic_conv/inputs.h"

namespace jet {

struct ApplyDynamicConvParams {
  ConvInputs in;
  bool silu;
  const void* kernels;   // [B, T, D, W] contiguous
  void* y;               // [B, T, D] contiguous
  void* conv_state_out;  // [N, D, W-1] contiguous
};

struct ApplyDynamicConvBackwardParams {
  ApplyDynamicConvParams forward;  // its y and conv_state_out are unused
  const void* grad_y;              // [B, T, D], strides as for x
  int64_t grad_y_stride[3];
  const void* grad_conv_state_out;  // [N, D, W-1] contiguous, or null: zeros
  void* dx;                         // [B, T, D] contiguous
  void* dkernels;                   // [B, T, D, W] contiguous
  void* dconv_state;                // [N, D, W-1] contiguous
};

// On the current CUDA device, of compute capability 9.0, in `stream` (a cudaStream_t). The params must satisfy
// dynamic_conv_kernel_takes.
void apply_dynamic_conv_hopper(const ApplyDynamicConvParams& params, void* stream);

void apply_dynamic_conv_cpu(const ApplyDynamicConvParams& params, const Parallel& parallel);
void apply_dynamic_conv_backward_cpu(const ApplyDynamicConvBackwardParams& params, const Parallel& parallel);

}  // namespace jet
