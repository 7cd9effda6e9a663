// Allocations, copies and device variables. Host memory is device memory; an allocation is registered, so that kernels
// are held to its bounds.
#include <cstdlib>

#include "runtime.h"

namespace hoppersim {

namespace {

// Far enough apart that a small overrun never lands in the neighbour. Unwritten memory reads as NaN.
constexpr size_t kAlignment = 512;
constexpr uint8_t kUnwritten = 0xff;

cudaError_t copy(void* to, const void* from, size_t bytes) {
  if (bytes != 0 && (to == nullptr || from == nullptr)) return set_last_error(cudaErrorInvalidValue);
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

template <class Use>
cudaError_t with_variable(const void* symbol, size_t bytes, size_t offset, Use use) {
  try {
    VariableBytes* variable = find_variable(symbol);
    if (variable == nullptr) return set_last_error(cudaErrorInvalidSymbol);
    if (offset > variable->size() || bytes > variable->size() - offset) return set_last_error(cudaErrorInvalidValue);
    use(variable->data() + offset);
    return cudaSuccess;
  } catch (const Fault& fault) {
    keep_fault(fault);
    return set_last_error(cudaErrorInvalidKernelImage);
  }
}

}  // namespace

}  // namespace hoppersim

using namespace hoppersim;

extern "C" {

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  const size_t padded = (bytes + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
  *pointer = std::aligned_alloc(kAlignment, padded);
  if (*pointer == nullptr) return set_last_error(cudaErrorMemoryAllocation);
  std::memset(*pointer, kUnwritten, padded);
  global_ranges().add(*pointer, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  if (!global_ranges().contains(reinterpret_cast<uint64_t>(pointer), 1, false))
    return set_last_error(cudaErrorInvalidValue);
  global_ranges().remove(pointer);
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) { return cudaMalloc(pointer, bytes); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return cudaMalloc(pointer, bytes); }
cudaError_t cudaFreeHost(void* pointer) { return cudaFree(pointer); }
cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned) { return cudaMalloc(pointer, bytes); }

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { return copy(to, from, bytes); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return copy(to, from, bytes);
}

cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  if (bytes != 0 && pointer == nullptr) return set_last_error(cudaErrorInvalidValue);
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(pointer, value, bytes);
}

cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, cudaMemcpyKind) {
  return with_variable(symbol, bytes, offset, [&](uint8_t* at) { std::memcpy(at, from, bytes); });
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind) {
  return with_variable(symbol, bytes, offset, [&](uint8_t* at) { std::memcpy(to, at, bytes); });
}
cudaError_t cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes, size_t offset,
                                    cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}
cudaError_t cudaMemcpyFromSymbolAsync(void* to, const void* symbol, size_t bytes, size_t offset, cudaMemcpyKind kind,
                                      cudaStream_t) {
  return cudaMemcpyFromSymbol(to, symbol, bytes, offset, kind);
}
cudaError_t cudaGetSymbolAddress(void** pointer, const void* symbol) {
  return with_variable(symbol, 0, 0, [&](uint8_t* at) { *pointer = at; });
}
cudaError_t cudaGetSymbolSize(size_t* bytes, const void* symbol) {
  return with_variable(symbol, 0, 0, [&](uint8_t*) { *bytes = find_variable(symbol)->size(); });
}

}  // extern "C"
