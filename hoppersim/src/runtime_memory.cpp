// Allocations, copies and device variables. Host memory is device memory; an allocation is registered, so that kernels
// are held to its bounds.
#include <cstdlib>
#include <map>

#include "runtime.h"

namespace hoppersim {

namespace {

// Far enough apart that a small overrun never lands in the neighbour. Unwritten memory reads as NaN.
constexpr size_t kAlignment = 512;
constexpr uint8_t kUnwritten = 0xff;

// What the program allocated, or registered itself; by address.
struct Allocation {
  size_t size = 0;
  cudaMemoryType type = cudaMemoryTypeUnregistered;
  unsigned flags = 0;
  bool owned = true;  // allocated here, not cudaHostRegister
};
struct Allocations {
  std::mutex mutex;
  std::map<uint64_t, Allocation> blocks;
  size_t on_device = 0;
};
// Never destroyed: programs free from exit handlers.
Allocations& allocations() {
  static auto* a = new Allocations;
  return *a;
}

uint64_t address_of(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

cudaError_t allocate(void** pointer, size_t bytes, cudaMemoryType type, unsigned flags = 0) {
  if (pointer == nullptr) return set_last_error(cudaErrorInvalidValue);
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  Allocations& all = allocations();
  std::lock_guard<std::mutex> lock(all.mutex);
  if (type != cudaMemoryTypeHost && bytes > kMemoryBytes - all.on_device)
    return set_last_error(cudaErrorMemoryAllocation);
  const size_t padded = (bytes + kAlignment - 1) / kAlignment * kAlignment + kAlignment;
  *pointer = std::aligned_alloc(kAlignment, padded);
  if (*pointer == nullptr) return set_last_error(cudaErrorMemoryAllocation);
  std::memset(*pointer, kUnwritten, padded);
  global_ranges().add(*pointer, bytes);
  all.blocks[address_of(*pointer)] = {bytes, type, flags};
  if (type != cudaMemoryTypeHost) all.on_device += bytes;
  return cudaSuccess;
}

// Only what was allocated as host memory may be freed or unregistered as such, and likewise elsewhere.
cudaError_t release(void* pointer, bool host, bool owned) {
  if (pointer == nullptr && owned) return cudaSuccess;
  Allocations& all = allocations();
  std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.blocks.find(address_of(pointer));
  if (found == all.blocks.end() || (found->second.type == cudaMemoryTypeHost) != host || found->second.owned != owned)
    return set_last_error(owned ? cudaErrorInvalidValue : cudaErrorHostMemoryNotRegistered);
  if (!host) all.on_device -= found->second.size;
  all.blocks.erase(found);
  global_ranges().remove(pointer);
  if (owned) std::free(pointer);
  return cudaSuccess;
}

// The block that an address lies in, of type "unregistered" if in none.
Allocation block_at(const void* pointer) {
  Allocations& all = allocations();
  std::lock_guard<std::mutex> lock(all.mutex);
  auto next = all.blocks.upper_bound(address_of(pointer));
  if (next == all.blocks.begin()) return {};
  const auto& [begin, block] = *std::prev(next);
  return address_of(pointer) - begin < block.size ? block : Allocation{};
}

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

cudaError_t cudaMalloc(void** pointer, size_t bytes) { return allocate(pointer, bytes, cudaMemoryTypeDevice); }
cudaError_t cudaFree(void* pointer) { return release(pointer, false, true); }
cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t) { return cudaMalloc(pointer, bytes); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }
cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned flags) {
  return allocate(pointer, bytes, cudaMemoryTypeManaged, flags);
}
cudaError_t cudaMallocPitch(void** pointer, size_t* pitch, size_t width, size_t height) {
  *pitch = (width + kAlignment - 1) / kAlignment * kAlignment;
  return cudaMalloc(pointer, *pitch * height);
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags) {
  return allocate(pointer, bytes, cudaMemoryTypeHost, flags | cudaHostAllocMapped);  // as unified addressing does
}
cudaError_t cudaMallocHost(void** pointer, size_t bytes) { return cudaHostAlloc(pointer, bytes, cudaHostAllocDefault); }
cudaError_t cudaFreeHost(void* pointer) { return release(pointer, true, true); }

cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned flags) {
  if (pointer == nullptr || bytes == 0) return set_last_error(cudaErrorInvalidValue);
  Allocations& all = allocations();
  std::lock_guard<std::mutex> lock(all.mutex);
  const Allocation block{bytes, cudaMemoryTypeHost, flags | cudaHostRegisterMapped, false};
  if (!all.blocks.emplace(address_of(pointer), block).second)
    return set_last_error(cudaErrorHostMemoryAlreadyRegistered);
  global_ranges().add(pointer, bytes);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void* pointer) { return release(pointer, true, false); }

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = nullptr;
  if (block_at(host).type != cudaMemoryTypeHost) return set_last_error(cudaErrorInvalidValue);
  return *device = host, cudaSuccess;
}
cudaError_t cudaHostGetFlags(unsigned* flags, void* host) {
  const Allocation block = block_at(host);
  if (block.type != cudaMemoryTypeHost) return set_last_error(cudaErrorInvalidValue);
  return *flags = block.flags, cudaSuccess;
}

// Variables, and arrays that a test passes as a device's, are device memory.
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  cudaMemoryType type = block_at(pointer).type;
  if (type == cudaMemoryTypeUnregistered && global_ranges().contains(address_of(pointer), 1, false))
    type = cudaMemoryTypeDevice;
  // Not `reserved`, which a program of CUDA 12 has no room for.
  attributes->type = type;
  attributes->device = type == cudaMemoryTypeUnregistered ? cudaInvalidDeviceId : 0;
  attributes->devicePointer = type == cudaMemoryTypeUnregistered ? nullptr : const_cast<void*>(pointer);
  attributes->hostPointer = type == cudaMemoryTypeDevice ? nullptr : const_cast<void*>(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  Allocations& all = allocations();
  std::lock_guard<std::mutex> lock(all.mutex);
  *total = kMemoryBytes;
  *free = kMemoryBytes - all.on_device;
  return cudaSuccess;
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) { return copy(to, from, bytes); }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return copy(to, from, bytes);
}
cudaError_t cudaMemcpyPeer(void* to, int to_device, const void* from, int from_device, size_t bytes) {
  if (to_device != 0 || from_device != 0) return set_last_error(cudaErrorInvalidDevice);
  return copy(to, from, bytes);
}
cudaError_t cudaMemcpyPeerAsync(void* to, int to_device, const void* from, int from_device, size_t bytes,
                                cudaStream_t) {
  return cudaMemcpyPeer(to, to_device, from, from_device, bytes);
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                         cudaMemcpyKind) {
  if (width > to_pitch || width > from_pitch) return set_last_error(cudaErrorInvalidPitchValue);
  for (size_t row = 0; row < height; ++row)
    if (const cudaError_t error = copy(static_cast<uint8_t*>(to) + row * to_pitch,
                                       static_cast<const uint8_t*>(from) + row * from_pitch, width))
      return error;
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy2D(to, to_pitch, from, from_pitch, width, height, kind);
}

cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  if (bytes != 0 && pointer == nullptr) return set_last_error(cudaErrorInvalidValue);
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(pointer, value, bytes);
}
cudaError_t cudaMemset2D(void* pointer, size_t pitch, int value, size_t width, size_t height) {
  if (width > pitch) return set_last_error(cudaErrorInvalidPitchValue);
  for (size_t row = 0; row < height; ++row)
    if (const cudaError_t error = cudaMemset(static_cast<uint8_t*>(pointer) + row * pitch, value, width)) return error;
  return cudaSuccess;
}
cudaError_t cudaMemset2DAsync(void* pointer, size_t pitch, int value, size_t width, size_t height, cudaStream_t) {
  return cudaMemset2D(pointer, pitch, value, width, height);
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
