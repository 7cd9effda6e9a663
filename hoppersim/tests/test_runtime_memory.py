"""Memory of a program: kinds of allocations, what a pointer is, pitched copies; streams and their facts."""

import numpy as np
import pytest

import hoppersim

SUCCESS, INVALID_VALUE, MEMORY_ALLOCATION, INVALID_PITCH, NOT_REGISTERED = 0, 1, 2, 12, 713
ALREADY_REGISTERED = 712
UNREGISTERED, HOST, DEVICE, MANAGED = range(4)

SOURCE = r"""
#include <cuda_runtime.h>
#include <cstdint>
#include <cstdlib>
#include <cstring>

__device__ int variable[4];
__managed__ int managed[2] = {3, 4};
__global__ void add_to_managed() { managed[threadIdx.x] += 10; }
__global__ void fill(int* x, int n, int value) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = value + i;
}

extern "C" {

// kind: 0 malloc, 1 cudaMallocHost, 2 cudaMalloc, 3 cudaMallocManaged, 4 cudaHostAlloc, 5 cudaHostRegister,
// 6 cudaMallocAsync, 7 a variable
static void* make(int64_t kind, size_t bytes) {
  void* p = nullptr;
  switch (kind) {
    case 1: cudaMallocHost(&p, bytes); break;
    case 2: cudaMalloc(&p, bytes); break;
    case 3: cudaMallocManaged(&p, bytes); break;
    case 4: cudaHostAlloc(&p, bytes, cudaHostAllocMapped); break;
    case 5: p = std::malloc(bytes), cudaHostRegister(p, bytes, cudaHostRegisterDefault); break;
    case 6: cudaMallocAsync(&p, bytes, 0); break;
    case 7: cudaGetSymbolAddress(&p, variable); break;
    default: p = std::malloc(bytes);
  }
  return p;
}
static int drop(int64_t kind, void* p) {
  switch (kind) {
    case 1:
    case 4: return cudaFreeHost(p);
    case 5: {
      const int error = cudaHostUnregister(p);
      return std::free(p), error;
    }
    case 0: return std::free(p), 0;
    case 7: return 0;
    default: return cudaFree(p);
  }
}

// type, device, whether the device's and the host's pointers are the pointer; of an address inside of the block
int attributes(int64_t kind, int* facts) {
  char* p = static_cast<char*>(make(kind, 16));
  struct { cudaPointerAttributes a; int guard = 7; } s;
  const int error = cudaPointerGetAttributes(&s.a, p + 3);
  facts[0] = s.a.type, facts[1] = s.a.device;
  facts[2] = s.a.devicePointer == p + 3 ? 1 : s.a.devicePointer == nullptr ? 0 : -1;
  facts[3] = s.a.hostPointer == p + 3 ? 1 : s.a.hostPointer == nullptr ? 0 : -1;
  drop(kind, p);
  return error;
}

// A kernel writes it, the host reads it.
int written_by_a_kernel(int64_t kind, int* sum) {
  int* p = static_cast<int*>(make(kind, 4 * sizeof(int)));
  int* device = p;
  if (kind == 1 || kind == 4 || kind == 5)
    if (const int error = cudaHostGetDevicePointer(&device, p, 0)) return error;
  fill<<<1, 32>>>(device, 4, 10);
  int read[4];
  cudaMemcpy(read, p, sizeof read, cudaMemcpyDefault);
  *sum = read[0] + read[1] + read[2] + read[3];
  const int error = cudaGetLastError();
  return error ? error : drop(kind, p);
}

int freed_as(int64_t kind, int64_t other) {
  void* p = make(kind, 16);
  const int error = other == 5 ? cudaHostUnregister(p) : other == 1 ? cudaFreeHost(p) : cudaFree(p);
  drop(kind, p);
  cudaGetLastError();
  return error;
}

int register_twice() {
  void* p = make(5, 64);
  const int error = cudaHostRegister(p, 64, 0);
  drop(5, p);
  return error;
}

int flags_of(int64_t flags) {
  void* p;
  unsigned found = 0;
  cudaHostAlloc(&p, 16, flags);
  const int error = cudaHostGetFlags(&found, p);
  cudaFreeHost(p);
  return error ? -1 : static_cast<int>(found);
}

int memory_info(int64_t* out) {
  size_t free[3], total[3];
  cudaMemGetInfo(&free[0], &total[0]);
  void *device = make(2, 1000000), *host = make(1, 500000);
  cudaMemGetInfo(&free[1], &total[1]);
  drop(2, device), drop(1, host);
  cudaMemGetInfo(&free[2], &total[2]);
  for (int i = 0; i < 3; ++i) out[i] = static_cast<int64_t>(free[i]), out[3 + i] = static_cast<int64_t>(total[i]);
  void* huge = &huge;
  return cudaMalloc(&huge, total[0]) == cudaErrorMemoryAllocation || huge ? cudaGetLastError() : -1;
}

// Rows of `width` bytes there and back through a pitched allocation, and the last column set.
int pitched(const unsigned char* from, unsigned char* to, int64_t pitch, int64_t width, int64_t height) {
  void* device;
  size_t device_pitch;
  cudaMallocPitch(&device, &device_pitch, width, height);
  if (device_pitch < static_cast<size_t>(width) || device_pitch % 512) return -1;
  int error = cudaMemcpy2D(device, device_pitch, from, pitch, width, height, cudaMemcpyHostToDevice);
  if (!error) error = cudaMemset2DAsync(static_cast<char*>(device) + width - 1, device_pitch, 7, 1, height, 0);
  if (!error) error = cudaMemcpy2DAsync(to, pitch, device, device_pitch, width, height, cudaMemcpyDeviceToHost, 0);
  cudaFree(device);
  return error == cudaGetLastError() ? error : -1;
}

static void CUDART_CB add_one(void* data) { ++*static_cast<int*>(data); }
int streams(int* out) {
  cudaStream_t stream;
  unsigned flags;
  cudaDeviceGetStreamPriorityRange(&out[0], &out[1]);
  cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, -9);
  cudaStreamGetFlags(stream, &flags), out[2] = static_cast<int>(flags);
  cudaStreamGetPriority(stream, &out[3]);
  cudaStreamGetPriority(cudaStreamPerThread, &out[4]);
  out[5] = 0;
  cudaLaunchHostFunc(stream, add_one, &out[5]);
  cudaDeviceSetLimit(cudaLimitStackSize, 4096), cudaMemPrefetchAsync(out, 4, cudaMemLocation{}, 0, stream);
  cudaStreamDestroy(stream);
  return cudaGetLastError();
}

int managed_variable(int* out) {
  out[0] = managed[0], managed[1] = 7;
  add_to_managed<<<1, 2>>>();
  out[1] = managed[0], out[2] = managed[1];
  return cudaDeviceSynchronize();
}

int name_of_kernel() {
  const char* name = nullptr;
  cudaFuncGetName(&name, reinterpret_cast<const void*>(fill));
  return name && std::strstr(name, "fill") ? 0 : -1;
}

}
"""


@pytest.fixture(scope="module")
def library():
    return hoppersim.compile_cuda(SOURCE)


@pytest.mark.parametrize(
    "kind, facts",
    [
        (0, (UNREGISTERED, -2, 0, 1)),
        (1, (HOST, 0, 1, 1)),
        (2, (DEVICE, 0, 1, 0)),
        (3, (MANAGED, 0, 1, 1)),
        (4, (HOST, 0, 1, 1)),
        (5, (HOST, 0, 1, 1)),
        (6, (DEVICE, 0, 1, 0)),
        (7, (DEVICE, 0, 1, 0)),
    ],
)
def test_what_a_pointer_is(library, kind, facts):
    got = np.full(4, 99, np.int32)
    assert library.call("attributes", kind, got) == SUCCESS
    assert tuple(got) == facts


@pytest.mark.parametrize("kind", range(1, 8))
def test_kernels_may_write_it(library, kind):
    total = np.zeros(1, np.int32)
    assert library.call("written_by_a_kernel", kind, total) == SUCCESS
    assert total[0] == 10 + 11 + 12 + 13


def test_kernels_may_not_write_the_rest_of_the_host(library):
    with pytest.raises(hoppersim.Fault, match="out-of-bounds global"):
        library.call("written_by_a_kernel", 0, np.zeros(1, np.int32))


@pytest.mark.parametrize(
    "kind, freed, error",
    [
        (2, 1, INVALID_VALUE),
        (1, 2, INVALID_VALUE),
        (0, 2, INVALID_VALUE),
        (1, 5, NOT_REGISTERED),
        (0, 5, NOT_REGISTERED),
    ],
)
def test_memory_is_freed_as_it_was_allocated(library, kind, freed, error):
    assert library.call("freed_as", kind, freed) == error


def test_registering_twice(library):
    assert library.call("register_twice") == ALREADY_REGISTERED


@pytest.mark.parametrize("flags", [0, 1, 4])
def test_flags_of_host_memory(library, flags):
    mapped = 2  # always, with unified addressing
    assert library.call("flags_of", flags) == flags | mapped


def test_memory_info(library):
    values = np.zeros(6, np.int64)
    assert library.call("memory_info", values) == MEMORY_ALLOCATION
    free, total = values[:3], values[3:]
    assert len(set(total)) == 1 and 0 < free[0] <= total[0]
    assert free[0] - free[1] == 1000000 and free[2] == free[0]


def test_pitched_copies(library):
    x, y = np.random.default_rng(0).integers(0, 256, (5, 48), dtype=np.uint8), np.zeros((5, 48), np.uint8)
    assert library.call("pitched", x, y, 48, 33, 5) == SUCCESS
    expected = np.zeros_like(x)
    expected[:, :33] = x[:, :33]
    expected[:, 32] = 7
    np.testing.assert_array_equal(y, expected)
    assert library.call("pitched", x, y, 32, 33, 5) == INVALID_PITCH


def test_streams(library):
    values = np.zeros(6, np.int32)
    assert library.call("streams", values) == SUCCESS
    assert values.tolist() == [0, -5, 1, -5, 0, 1]


def test_managed_variables(library):
    values = np.zeros(3, np.int32)
    assert library.call("managed_variable", values) == SUCCESS
    assert values.tolist() == [3, 13, 17]


def test_name_of_a_kernel(library):
    assert library.call("name_of_kernel") == 0
