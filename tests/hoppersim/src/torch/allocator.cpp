// A CPU allocator for torch that registers every storage with the simulator: kernels launched on CPU tensors are held to the
// bounds of the tensors' storages, and memory nobody wrote reads as NaN.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>

#include "machine.h"

namespace {

constexpr size_t kGuard = 256;     // bytes between a storage and whatever lies behind it
constexpr int kUnwritten = 0xff;   // NaN in every floating type, -1 in integers

struct Storage {
  c10::DataPtr memory;
};

void release(void* context) {
  auto* storage = static_cast<Storage*>(context);
  hoppersim::global_ranges().remove(storage->memory.get());
  delete storage;
}

struct RegisteringAllocator final : c10::Allocator {
  explicit RegisteringAllocator(c10::Allocator* underlying) : underlying(underlying) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return underlying->allocate(0);
    auto* storage = new Storage{underlying->allocate(bytes + kGuard)};
    void* data = storage->memory.get();
    std::memset(data, kUnwritten, bytes + kGuard);
    hoppersim::global_ranges().add(data, bytes);
    return {data, storage, &release, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  c10::Allocator* underlying;
};

constexpr uint8_t kPriority = 1;  // above torch's own

[[maybe_unused]] const bool installed = [] {
  // Never destroyed: tensors may outlive this library's static objects.
  c10::SetCPUAllocator(new RegisteringAllocator(c10::GetDefaultCPUAllocator()), kPriority);
  return true;
}();

}  // namespace
