// Attention of one new token of each of N sequences, for decode. Keys and values lie in caches of L slots, which are
// used as a ring once they are full. With n = lengths[n] tokens before this one, slot s = n % L, u = min(n + 1, L):
//
//   rotate(x)_i      = x_i cos_i - x_{i+D/2} sin_i,  rotate(x)_{i+D/2} = x_{i+D/2} cos_{i+D/2} + x_i sin_{i+D/2}
//   key[n,:,s,:]     = rotate(k),  value[n,:,s,:] = v                        rounded to the dtype
//   p                = softmax over j < u of scale <rotate(q), key[n,h/G,j,:]>    q rounded to the dtype, G = H / Hkv
//   o[n,h,:]         = sum over j < u of p_j value[n,h/G,j,:]
//
// A negative length touches nothing and gives o = 0. Slots from u on are not read.
#pragma once

#include "csrc/common/parallel.h"
#include "csrc/common/tensors.h"

namespace jet {

// Element strides of a cache [N, Hkv, L, D].
struct AttentionCacheStrides {
  int64_t n, h, l, d;
};

struct AttentionCache {
  void* data;
  AttentionCacheStrides strides;
};

struct AttentionStepParams {
  Dtype dtype;  // of all but cos and sin
  int64_t N, H, Hkv, L, D;
  double scale;
  TokenTensor q;           // [N, H, D]
  TokenTensor k, v;        // [N, Hkv, D]
  TokenTensor cos, sin;    // [N, D] fp32
  AttentionCache key;      // [N, Hkv, L, D]
  AttentionCache value;    // [N, Hkv, L, D]
  const int64_t* lengths;  // [N] contiguous
  void* o;                 // [N, H, D] contiguous
};

void attention_step_cpu(const AttentionStepParams& params, const Parallel& parallel);

// On the current CUDA device, of compute capability 9.0, in `stream` (a cudaStream_t). The params must satisfy
// attention_step_kernel_takes. `workspace`: so many fp32 as attention_step_workspace says, for the sums of the splits;
// it depends on sizes, not on lengths.
int64_t attention_step_workspace(const AttentionStepParams& params);
void attention_step_hopper(const AttentionStepParams& params, float* workspace, void* stream);

}  // namespace jet
