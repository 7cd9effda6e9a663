// One step of the dynamic convolution, for decode: a token for each of N sequences, whose states are rows of a pool and
// are shifted in place. With s = pool.rows[n]:
//
//   taps[n,d,w] = sum_r weight[d*W+w, r] * hidden[n,r] + bias[d*W+w]
//   z[n,d]      = sum_{w<W-1} taps[n,d,w] * pool[s,d,w] + taps[n,d,W-1] * x[n,d]
//   y           = silu(z) or z
//   pool[s,d,:] <- pool[s,d,1:], x[n,d]
//
// A negative s touches no state and gives y[n,:] = 0.
#pragma once

#include "csrc/common/parallel.h"
#include "csrc/dynamic_conv/inputs.h"

namespace jet {

struct DynamicConvStepParams {
  ConvInputs in;  // B = N sequences of T = 1 token; their states are in the pool, not in conv_state
  TapGenerator generator;
  ConvStatePool pool;
  void* y;  // [N, D] contiguous
};

void dynamic_conv_step_cpu(const DynamicConvStepParams& params, const Parallel& parallel);

// On the current CUDA device, of compute capability 9.0, in `stream` (a cudaStream_t). The params must satisfy
// dynamic_conv_step_kernel_takes.
void dynamic_conv_step_hopper(const DynamicConvStepParams& params, void* stream);

// The same with taps from silu(hidden), rounded to the dtype of hidden. On a CPU the sums may be added up in another
// order than those of dynamic_conv_step_cpu.
void dynamic_conv_step_of_silu_cpu(const DynamicConvStepParams& params, const Parallel& parallel);
void dynamic_conv_step_of_silu_hopper(const DynamicConvStepParams& params, void* stream);

}  // namespace jet
