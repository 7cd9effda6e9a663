// The first 48 threads fill a table that all read.
#include "ptx.h"

__global__ void look_up(const float* in, float* out) {
  __shared__ float table[48];
  if (threadIdx.x < 48) {
    table[threadIdx.x] = in[threadIdx.x];
#ifndef FIXED
    __syncthreads();  // half of warp 1 never comes here
#endif
  }
#ifdef FIXED
  __syncthreads();
#endif
  out[threadIdx.x] = table[threadIdx.x % 48];
}

int main() {
  return !check(look_up, 1, 64, 64, [](const float* in, int i) { return in[i % 48]; });
}
