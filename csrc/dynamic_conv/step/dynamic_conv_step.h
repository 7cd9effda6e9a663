// One step of the dynamic convolution per sequence, its state shifted in place. With s = state_rows[n]:
//
//   kernel[d,w] = sum_r weight[d*W+w, r] * hidden[n,r] + bias[d*W+w]
//   y[n,d]      = act(sum_{w<W-1} kernel[d,w] * conv_state[s,d,w] + kernel[d,W-1] * x[n,d])
//   conv_state[s,d,:] <- conv_state[s,d,1:], x[n,d]
//
// A negative s touches no state and gives y[n,:] = 0.
#pragma once

#include "csrc/common/dtype.h"
#include "csrc/common/parallel.h"

namespace jet {

struct DynamicConvStepParams {
  Dtype dtype;  // of every floating-point pointer
  int64_t N, D, R, W;
  bool silu;
  const void* x;  // [N, D], element (n, d) at n * x_stride[0] + d * x_stride[1]
  int64_t x_stride[2];
  const void* hidden;  // [N, R], strides as for x
  int64_t hidden_stride[2];
  const void* weight;  // [D*W, R] contiguous
  const void* bias;    // [D*W] contiguous, or null
  int64_t P;
  void*
      conv_state;  // [P, D, W-1], element (s, d, j) at s * state_stride[0] + d * state_stride[1] + j * state_stride[2]
  int64_t state_stride[3];
  const void* state_rows;  // [N], each named once; null: row n for sequence n
  IndexType
      state_rows_dtype;  // i64 on a CPU, where the rows have been checked. On a device a row of P or more is no row
  void* y;               // [N, D] contiguous
};

void dynamic_conv_step_cpu(const DynamicConvStepParams& params, const Parallel& parallel);

// On the current CUDA device, of compute capability 9.0, in `stream` (a cudaStream_t). The params must satisfy
// dynamic_conv_kernel_takes.
void dynamic_conv_step_hopper(const DynamicConvStepParams& params, void* stream);

}  // namespace jet
