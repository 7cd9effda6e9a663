// 256 numbers are doubled in shared memory, and a bulk copy of the copy engine writes them to global memory.
#include <cstdint>
#include <cstdio>

__global__ void twice(const float* in, float* out) {
  __shared__ alignas(16) float tile[256];
  tile[threadIdx.x] = 2 * in[threadIdx.x];
#ifdef FIXED
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the copy engine sees what this thread wrote
#endif
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 1024;" ::"l"(out), "r"(from) : "memory");
    asm volatile("cp.async.bulk.commit_group;\n\tcp.async.bulk.wait_group 0;" ::: "memory");
  }
}

int main() {
  float *in, *out;
  cudaMallocManaged(&in, 1024);
  cudaMallocManaged(&out, 1024);
  for (int i = 0; i < 256; ++i) in[i] = static_cast<float>(i);
  twice<<<1, 256>>>(in, out);
  if (cudaDeviceSynchronize() != cudaSuccess || cudaGetLastError() != cudaSuccess) return 1;
  for (int i = 0; i < 256; ++i)
    if (out[i] != 2 * in[i]) return 1;
  std::puts("right");
}
