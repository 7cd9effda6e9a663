// Where kernels are launched: the device of a tensor, made current, and its current stream.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "bindings/backend.h"

// Lives in libtorch_cuda, which a CPU build of PyTorch has not.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace jet::bindings {

// The device on which kernels for `t` are launched, or kHost if they are called. JET_SIMULATED_DEVICE (registration.h):
// CPU tensors stand for those of device 0.
inline int launch_device(const torch::stable::Tensor& t) {
#ifdef JET_SIMULATED_DEVICE
  return t.is_cpu() ? 0 : kHost;
#else
  return t.is_cuda() ? static_cast<int>(t.get_device_index()) : kHost;
#endif
}

// While it lives, the device of `t` is current.
class LaunchScope {
 public:
  explicit LaunchScope([[maybe_unused]] const torch::stable::Tensor& t) {
#ifndef JET_SIMULATED_DEVICE
    guard_.emplace(t.get_device_index());
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
#endif
  }
  void* stream() const { return stream_; }  // a cudaStream_t

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
};

}  // namespace jet::bindings
