// A mean of neighbours, with a margin of one number on both sides.
#include "ptx.h"

__global__ void smooth(const float* in, float* out) {
  __shared__ float x[130];
  x[threadIdx.x + 1] = in[threadIdx.x];
  if (threadIdx.x == 0) x[0] = 0;
#ifdef FIXED
  if (threadIdx.x == 0) x[129] = 0;
#endif
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x] + x[threadIdx.x + 1] + x[threadIdx.x + 2];
}

int main() {
  return !check(smooth, 1, 128, 128,
                [](const float* in, int i) { return (i > 0 ? in[i - 1] : 0) + in[i] + (i < 127 ? in[i + 1] : 0); });
}
