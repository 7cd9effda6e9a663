// The dynamic causal convolution of JetBlock (arXiv 2508.15884): a depthwise short convolution of 2 to 4 taps, which a
// kernel generator makes anew for every token. The taps never reach memory.
//
//   taps[b,t,d,w] = sum_r weight[d*W+w, r] * hidden[b,t,r] + bias[d*W+w]
//   z[b,t,d]      = sum_w taps[b,t,d,w] * input(n, p-(W-1)+w)[d]       token (b,t) is token p of sequence n
//   y             = silu(z) or z
//
// Backward, with dz = dy silu'(z) or dy:
//   dtaps[b,t,d,w]            = dz[b,t,d] * input(n, p-(W-1)+w)[d]
//   dinput(n, p-(W-1)+w)[d]  += dz[b,t,d] * taps[b,t,d,w]             -> dx, dconv_state; plus grad_conv_state_out
//   dhidden [BT, R]  = dtaps weight      dweight [D*W, R] = dtaps^T hidden      dbias = column sums of dtaps
//
// fp32 arithmetic (fp64 for fp64); sums over tokens stay in fp32 until they are complete. One exception: where the CPU
// multiplies bf16 itself, dtaps is rounded to bf16 before the products that give dhidden and dweight (large inputs
// only).
#pragma once

#include "csrc/common/parallel.h"
#include "csrc/dynamic_conv/inputs.h"

namespace jet {

struct DynamicConvParams {
  ConvInputs in;
  TapGenerator generator;
  void* y;               // [B, T, D] contiguous
  void* conv_state_out;  // [N, D, W-1] contiguous
};

struct DynamicConvBackwardParams {
  ConvInputs in;
  TapGenerator generator;
  TokenTensor grad_y;               // [B, T, D]
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

// The same for the backward. `workspace`: dynamic_conv_backward_workspace() bytes of the device's memory, 128-byte
// aligned.
int64_t dynamic_conv_backward_workspace(const DynamicConvBackwardParams& params);
void dynamic_conv_backward_hopper(const DynamicConvBackwardParams& params, void* workspace, void* stream);

void dynamic_conv_cpu(const DynamicConvParams& params, const Parallel& parallel);
void dynamic_conv_backward_cpu(const DynamicConvBackwardParams& params, const Parallel& parallel);

}  // namespace jet
