// A CPU allocator for torch that registers every storage with the simulator: kernels launched on CPU tensors are held
// to the bounds of the tensors' storages, and memory nobody wrote reads as NaN.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>

#include "machine.h"

namespace {

constexpr size_t kGuard = 256;    // bytes between a storage and whatever lies behind it
constexpr int kUnwritten = 0xff;  // NaN in every floating type, -1 in integers

c10::Allocator* underlying = nullptr;

void release(void* data) {
  hoppersim::global_ranges().remove(data);
  underlying->raw_deallocate(data);
}

struct RegisteringAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return underlying->allocate(0);
    void* data = underlying->raw_allocate(bytes + kGuard);
    std::memset(data, kUnwritten, bytes + kGuard);
    hoppersim::global_ranges().add(data, bytes);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }

  // Some of torch's own code asks for raw memory: the context of a storage is its address, as that needs.
  c10::DeleterFnPtr raw_deleter() const override { return &release; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

constexpr uint8_t kPriority = 1;  // above torch's own

[[maybe_unused]] const bool installed = [] {
  // Never destroyed: tensors may outlive this library's static objects.
  underlying = c10::GetDefaultCPUAllocator();
  c10::SetCPUAllocator(new RegisteringAllocator(), kPriority);
  return true;
}();

}  // namespace
