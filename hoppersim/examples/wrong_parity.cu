// Four tiles go through one buffer; each is waited for at the mbarrier of its copy.
#include "ptx.h"

__global__ void copy(const float* in, float* out) {
  __shared__ alignas(128) float tile[256];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) mbarrier_init(&full, 1);
  __syncthreads();
  for (int step = 0; step < 4; ++step) {
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(&full, sizeof tile);
      bulk_load(tile, in + step * 256, sizeof tile, &full);
    }
#ifdef FIXED
    mbarrier_wait(&full, step % 2);  // the phases of an mbarrier alternate
#else
    mbarrier_wait(&full, 0);
#endif
    out[step * 256 + threadIdx.x] = tile[threadIdx.x];
    __syncthreads();
  }
}

int main() {
  return !check(copy, 1, 256, 1024, [](const float* in, int i) { return in[i]; });
}
