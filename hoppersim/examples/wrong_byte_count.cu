// A tile is loaded by two bulk copies, and the mbarrier is told the bytes of both.
#include "ptx.h"

__global__ void copy(const float* in, float* out) {
  __shared__ alignas(128) float tile[256];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 1);
#ifdef FIXED
    mbarrier_arrive_expect_tx(&full, 1024);
#else
    mbarrier_arrive_expect_tx(&full, 1040);
#endif
    bulk_load(tile, in, 512, &full);
    bulk_load(tile + 128, in + 128, 512, &full);
  }
  __syncthreads();
  mbarrier_wait(&full, 0);
  out[threadIdx.x] = tile[threadIdx.x];
}

int main() {
  return !check(copy, 1, 256, 256, [](const float* in, int i) { return in[i]; });
}
