// Host code and kernels for test_runtime.py: one function per part of the runtime, each returns a cudaError_t or a
// count.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

__constant__ float factors[4] = {1, 2, 3, 4};
__device__ int touched = 5;

template <int kScale>
__global__ void __launch_bounds__(128) scale(float* x, int n, char small, double offset) {
  extern __shared__ float staged[];
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  staged[threadIdx.x] = factors[threadIdx.x & 3];
  __syncthreads();
  if (i >= n) return;
  x[i] = x[i] * kScale * staged[threadIdx.x] + static_cast<float>(small + offset);
  atomicAdd(&touched, 1);
}

struct alignas(64) Packed {
  char bytes[192];
};

__global__ void unpack(const __grid_constant__ Packed packed, int* y, short shift) {
  y[blockIdx.x * blockDim.x + threadIdx.x] = packed.bytes[threadIdx.x] + shift;
}

__global__ void __cluster_dims__(2, 1, 1) ranks(int* y) {
  uint32_t rank, size;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  if (threadIdx.x == 0) y[blockIdx.x] = static_cast<int>(rank * 100 + size);
}

__global__ void ranks_by_launch(int* y) {
  uint32_t rank, size;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  if (threadIdx.x == 0) y[blockIdx.x] = static_cast<int>(rank * 100 + size);
}

__global__ void past_the_end(float* x, int n) { x[n + threadIdx.x] = 1; }

__global__ void with_static_shared(int* y) {
  __shared__ int staged[1024];
  staged[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  y[threadIdx.x] = staged[blockDim.x - 1 - threadIdx.x];
}

namespace {

int launch_with_cluster(int* y, unsigned grid, unsigned cluster, bool non_portable) {
  if (non_portable) cudaFuncSetAttribute(ranks_by_launch, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = 32;
  cudaLaunchAttribute attribute[2];
  attribute[0].id = cudaLaunchAttributeClusterDimension;
  attribute[0].val.clusterDim = {cluster, 1, 1};
  attribute[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[1].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attribute, config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, ranks_by_launch, y);
}

}  // namespace

extern "C" {

int run_scale(float* x, int64_t n, double offset) {
  scale<3><<<static_cast<unsigned>((n + 127) / 128), 128, 128 * sizeof(float)>>>(x, static_cast<int>(n), 7, offset);
  return cudaGetLastError();
}

int read_touched() {
  int count = 0;
  return cudaMemcpyFromSymbol(&count, touched, sizeof count) == cudaSuccess ? count : -1;
}

int write_variables(const float* values) {
  const int zero = 0;
  if (cudaMemcpyToSymbol(touched, &zero, sizeof zero) != cudaSuccess) return -1;
  return cudaMemcpyToSymbol(factors, values, sizeof factors);
}

int run_unpack(int* y) {
  Packed packed;
  for (int i = 0; i < 192; ++i) packed.bytes[i] = static_cast<char>(i - 96);
  unpack<<<1, 192>>>(packed, y, 1000);
  return cudaGetLastError();
}

int run_ranks(int* y, int64_t grid) {
  ranks<<<static_cast<unsigned>(grid), 32>>>(y);
  return cudaGetLastError();
}

int run_ranks_by_launch(int* y, int64_t grid, int64_t cluster, int64_t non_portable) {
  return launch_with_cluster(y, static_cast<unsigned>(grid), static_cast<unsigned>(cluster), non_portable != 0);
}

int run_past_the_end(float* x, int64_t n) {
  past_the_end<<<1, 32>>>(x, static_cast<int>(n));
  return cudaGetLastError();
}

const char* text_of_past_the_end(float* x, int64_t n) {
  return cudaGetErrorString(static_cast<cudaError_t>(run_past_the_end(x, n)));
}

int launch_shape(int64_t grid_x, int64_t grid_y, int64_t threads, int64_t shared) {
  const dim3 grid(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y));
  scale<3><<<grid, static_cast<unsigned>(threads), shared>>>(nullptr, 0, 0, 0);
  const cudaError_t error = cudaPeekAtLastError();
  return cudaGetLastError() == error && cudaGetLastError() == cudaSuccess ? error : -1;
}

int allow_shared(int64_t bytes) {
  return cudaFuncSetAttribute(scale<3>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}
int allow_shared_beside_static(int64_t bytes) {
  return cudaFuncSetAttribute(with_static_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

int unknown_kernel() {
  static int not_a_kernel;
  return cudaLaunchKernel(&not_a_kernel, 1, 1, nullptr, 0, nullptr);
}

int attributes(int* values) {
  cudaFuncAttributes a;
  if (const cudaError_t error = cudaFuncGetAttributes(&a, with_static_shared)) return error;
  values[0] = static_cast<int>(a.sharedSizeBytes), values[1] = a.maxThreadsPerBlock,
  values[2] = a.maxDynamicSharedSizeBytes;
  cudaFuncGetAttributes(&a, scale<3>);
  values[3] = a.maxThreadsPerBlock;
  cudaFuncGetAttributes(&a, ranks);
  values[4] = a.requiredClusterWidth;
  return cudaSuccess;
}

int device(int* values) {
  cudaDeviceProp p;
  int count, attribute;
  cudaGetDeviceCount(&count), cudaGetDeviceProperties(&p, 0);
  cudaDeviceGetAttribute(&attribute, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  values[0] = count, values[1] = p.major * 10 + p.minor, values[2] = p.multiProcessorCount, values[3] = attribute;
  values[4] = p.regsPerMultiprocessor, values[5] = p.maxThreadsPerMultiProcessor;
  return cudaSetDevice(1);
}

int versions(int* values) {
  cudaRuntimeGetVersion(&values[0]);
  return cudaDriverGetVersion(&values[1]);
}

int blocks_per_multiprocessor(int64_t threads, int64_t shared) {
  int blocks = -1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, scale<3>, static_cast<int>(threads), shared);
  return blocks;
}

// malloc, set, copy there and back with streams and events around it
int round_trip(const float* from, float* to, int64_t n) {
  float* device = nullptr;
  cudaStream_t stream;
  cudaEvent_t event;
  cudaStreamCreate(&stream), cudaEventCreate(&event);
  cudaMallocAsync(&device, n * sizeof(float), stream);
  cudaMemsetAsync(device, 0, n * sizeof(float), stream);
  cudaMemcpyAsync(device, from, n * sizeof(float), cudaMemcpyHostToDevice, stream);
  scale<3><<<static_cast<unsigned>((n + 127) / 128), 128, 128 * sizeof(float), stream>>>(device, static_cast<int>(n), 0,
                                                                                         0.5);
  cudaEventRecord(event, stream), cudaStreamWaitEvent(stream, event, 0), cudaEventSynchronize(event);
  cudaMemcpyAsync(to, device, n * sizeof(float), cudaMemcpyDeviceToHost, stream);
  cudaStreamSynchronize(stream);
  cudaFreeAsync(device, stream), cudaStreamDestroy(stream), cudaEventDestroy(event);
  return cudaDeviceSynchronize();
}

int double_free() {
  float* device = nullptr;
  cudaMalloc(&device, 4);
  cudaFree(device);
  const int error = cudaFree(device);
  return error == cudaGetLastError() ? error : -1;
}

int use_after_free() {
  float* device = nullptr;
  cudaMalloc(&device, 4096);
  cudaFree(device);
  past_the_end<<<1, 32>>>(device, 0);
  return cudaGetLastError();
}

int encode_tensor_map(float* address, int64_t row_bytes) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found) !=
      cudaSuccess)
    return -1;
  CUtensorMap map;
  const cuuint64_t extent[2] = {64, 16}, stride[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {32, 8}, element_stride[2] = {1, 1};
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, address, extent, stride, box, element_stride,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

int unknown_entry_point() {
  void* function = &function;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuNoSuchThing", &function, 12000, cudaEnableDefault, &found);
  return function == nullptr && found == cudaDriverEntryPointSymbolNotFound;
}

}  // extern "C"
