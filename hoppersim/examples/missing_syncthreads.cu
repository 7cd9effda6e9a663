// Numbers are turned round through shared memory.
#include "ptx.h"

__global__ void reverse(const float* in, float* out) {
  __shared__ float tile[256];
  tile[threadIdx.x] = 0;
  __syncthreads();
  tile[threadIdx.x] = in[threadIdx.x];
#ifdef FIXED
  __syncthreads();
#endif
  out[threadIdx.x] = tile[255 - threadIdx.x];  // of another warp
}

int main() {
  return !check(reverse, 1, 256, 256, [](const float* in, int i) { return in[255 - i]; });
}
