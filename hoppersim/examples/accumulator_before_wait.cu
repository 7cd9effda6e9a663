// One wgmma of ones: each number of D = A B is 16.
#include <cuda_fp16.h>

#include "ptx.h"

// Tiles of 8 rows by 16 bytes, two of them along K, without a swizzle.
__device__ uint64_t descriptor(const void* tile) {
  return (shared_address(tile) >> 4) | (128ull >> 4) << 16 | (256ull >> 4) << 32;
}

__global__ void product(const float*, float* out) {
  __shared__ alignas(128) __half a[64 * 16], b[8 * 16];
  for (int i = threadIdx.x; i < 64 * 16; i += 128) a[i] = b[i % 128] = __float2half(1);
  fence_proxy_async();
  __syncthreads();
  float d[4] = {};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "l"(descriptor(a)), "l"(descriptor(b)));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#ifdef FIXED
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
#ifndef FIXED
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");  // too late
#endif
}

int main() {
  return !check(product, 1, 128, 512, [](const float*, int) { return 16.0f; });
}
