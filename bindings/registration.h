// Registration of an op's implementation. Schemas are defined in Python (jetkernels/ops); this file only says which
// C++ function serves them. A second build may put the same bindings into another namespace.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "csrc/common/plain_reason.h"

#ifndef JET_NAMESPACE
#define JET_NAMESPACE jet
#endif

// JET_SIMULATED_DEVICE is set by that build when CPU tensors stand for a CUDA device's (tests/hoppersim): it has one
// implementation, and launch_device() sends every tensor down the launch path.
#ifdef JET_SIMULATED_DEVICE
#define JET_REGISTER(op, function) \
  STABLE_TORCH_LIBRARY_IMPL(JET_NAMESPACE, CPU, m) { m.impl(#op, TORCH_BOX(&function)); }
#else
#define JET_REGISTER(op, function)                                                        \
  STABLE_TORCH_LIBRARY_IMPL(JET_NAMESPACE, CPU, m) { m.impl(#op, TORCH_BOX(&function)); } \
  STABLE_TORCH_LIBRARY_IMPL(JET_NAMESPACE, CUDA, m) { m.impl(#op, TORCH_BOX(&function)); }
#endif

namespace jet::bindings {

namespace detail {

template <class Result>
struct Unstack {
  static Result get(StableIValue* stack) { return torch::stable::detail::to<Result>(stack[0]); }
  static constexpr std::size_t count = 1;
};

template <class... Results>
struct Unstack<std::tuple<Results...>> {
  static std::tuple<Results...> get(StableIValue* stack) {
    return torch::stable::detail::unbox_to_tuple<Results...>(stack);
  }
  static constexpr std::size_t count = sizeof...(Results);
};

template <>
struct Unstack<void> {
  static void get(StableIValue*) {}
  static constexpr std::size_t count = 0;
};

}  // namespace detail

// The plain PyTorch path: jet_plain::<op>(args..., reason), registered by jetkernels/ops.
template <class Result, class... Args>
Result call_plain(const char* qualified_op, PlainReason reason, const Args&... args) {
  std::array<StableIValue, std::max(sizeof...(Args) + 1, detail::Unstack<Result>::count)> stack{
      torch::stable::detail::from(args)..., torch::stable::detail::from(static_cast<int64_t>(reason))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(qualified_op, "", stack.data(), TORCH_ABI_VERSION));
  return detail::Unstack<Result>::get(stack.data());
}

}  // namespace jet::bindings
