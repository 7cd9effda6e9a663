// CTA 0 of a cluster tells CTA 1 through an mbarrier of CTA 1 that it is ready.
#include "ptx.h"

__global__ void __cluster_dims__(2) signal(const float* in, float* out) {
  __shared__ uint64_t ready;
  if (threadIdx.x == 0) mbarrier_init(&ready, 1);
  cluster_sync();
  if (cluster_rank() == 0) {
    float sum = 0;
    for (int i = threadIdx.x; i < 1024; i += 32) sum += in[i];
    out[threadIdx.x] = sum;
    __syncwarp();
    if (threadIdx.x == 0) mbarrier_arrive_remote(&ready, 1);
  } else {
#ifdef FIXED
    mbarrier_wait(&ready, 0);
#endif
    // Nothing keeps CTA 1, and its shared memory, until the arrival.
  }
}

int main() {
  return !check(signal, 2, 32, 32, [](const float* in, int i) {
    float sum = 0;
    for (; i < 1024; i += 32) sum += in[i];
    return sum;
  });
}
