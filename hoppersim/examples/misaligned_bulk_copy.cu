// A row is loaded by a bulk copy, whose addresses must be multiples of 16.
#include "ptx.h"

__global__ void copy_row(const float* in, float* out) {
  __shared__ alignas(128) float row[64];
  __shared__ uint64_t full;
#ifdef FIXED
  constexpr int pitch = 68;
#else
  constexpr int pitch = 65;  // an odd row begins at a multiple of 4
#endif
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 1);
    mbarrier_arrive_expect_tx(&full, sizeof row);
    bulk_load(row, in + 3 * pitch, sizeof row, &full);
  }
  __syncthreads();
  mbarrier_wait(&full, 0);
  out[threadIdx.x] = row[threadIdx.x] - in[3 * pitch + threadIdx.x];
}

int main() {
  return !check(copy_row, 1, 64, 64, [](const float*, int) { return 0.0f; });
}
