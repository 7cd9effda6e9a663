// Four tiles are doubled in one buffer, and stored from there by bulk copies.
#include "ptx.h"

__global__ void twice(const float* in, float* out) {
  __shared__ alignas(128) float tile[256];
  for (int step = 0; step < 4; ++step) {
#ifdef FIXED
    if (threadIdx.x == 0) bulk_wait_read();  // the store of the step before has read the buffer
#endif
    __syncthreads();
    tile[threadIdx.x] = 2 * in[step * 256 + threadIdx.x];
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) bulk_store(out + step * 256, tile, sizeof tile);
  }
  if (threadIdx.x == 0) bulk_wait();
}

int main() {
  return !check(twice, 1, 256, 1024, [](const float* in, int i) { return 2 * in[i]; });
}
