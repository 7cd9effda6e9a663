// The first 48 threads reverse a table; the others have nothing to do.
#include "ptx.h"

__global__ void reverse(const float* in, float* out) {
  __shared__ float table[48];
  if (threadIdx.x < 48) table[threadIdx.x] = in[threadIdx.x];
#ifndef FIXED
  if (threadIdx.x >= 48) return;  // half of warp 1 never comes to the barrier
#endif
  __syncthreads();
  if (threadIdx.x < 48) out[threadIdx.x] = table[47 - threadIdx.x];
}

int main() {
  return !check(reverse, 1, 64, 48, [](const float* in, int i) { return in[47 - i]; });
}
