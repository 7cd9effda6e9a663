// Dynamic causal convolution: every token generates its own kernel, and the kernels never reach memory.
//
//   kernel[b,t,d,w] = sum_r weight[d*W+w, r] * hidden[b,t,r] + bias[d*W+w]
//   z[b,t,d]        = sum_w kernel[b,t,d,w] * input(n, p-(W-1)+w)      token (b,t) is token p of sequence n
//   y               = silu(z) or z
//
// Backward, with dz = dy silu'(z) or dy:
//   dkernel[b,t,d,w]            = dz[b,t,d] * input(n, p-(W-1)+w)
//   dinput(n, p-(W-1)+w)[d]    += dz[b,t,d] * kernel[b,t,d,w]           -> dx, dconv_state; plus grad_conv_state_out
//   dhidden [BT, R]  = dkernel weight      dweight [D*W, R] = dkernel^T hidden      dbias = column sums of dkernel
//
// fp32 arithmetic (fp64 for fp64); sums over tokens stay in fp32 until they are complete. One exception: where the CPU
// multiplies bf16 itself, dkernel is rounded to bf16 before the products that give dhidden and dweight (large inputs
// only).
#pragma once

#include "csrc/common/parallel.h"
#include "csrc/dynamic_conv/inputs.h"

namespace jet {

struct DynamicConvParams {
  ConvInputs in;
  int64_t R;
  bool silu;
  const void* hidden;  // [B, T, R], strides as for x
  int64_t hidden_stride[3];
  const void* weight;    // [D*W, R] contiguous
  const void* bias;      // [D*W] contiguous, or null
  void* y;               // [B, T, D] contiguous
  void* conv_state_out;  // [N, D, W-1] contiguous
};

struct DynamicConvBackwardParams {
  DynamicConvParams forward;  // its y and conv_state_out are unused
  const void* grad_y;         // [B, T, D], strides as for x
  int64_t grad_y_stride[3];
  const void* grad_conv_state_out;  // [N, D, W-1] contiguous, or null: zeros
  void* dx;                         // [B, T, D] contiguous
  void* dhidden;                    // [B, T, R] contiguous
  void* dweight;                    // [D*W, R] contiguous
  void* dbias;                      // [D*W] contiguous
  void* dconv_state;                // [N, D, W-1] contiguous
};

// On the current CUDA device, of compute capability 9.0, in `stream` (a cudaStream_t). The params must satisfy
// dynamic_conv_kernel_takes.
void dynamic_conv_hopper(const DynamicConvParams& params, void* stream);

void dynamic_conv_cpu(const DynamicConvParams& params, const Parallel& parallel);
void dynamic_conv_backward_cpu(const DynamicConvBackwardParams& params, const Parallel& parallel);

}  // namespace jet
