// Registration of an op's implementation. Schemas are defined in Python (jetkernels/ops); this file only says which
// C++ function serves them. A second build may put the same bindings into another namespace.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <type_traits>
#include <utility>

#include "csrc/common/plain_reason.h"

#ifndef JET_NAMESPACE
#define JET_NAMESPACE jet
#endif

// JET_SIMULATED_DEVICE is set by that build when CPU tensors stand for a CUDA device's (tests/simulated): it has one
// implementation, and launch_device() sends every tensor down the launch path.
#ifdef JET_SIMULATED_DEVICE
#define JET_REGISTER(op, function) \
  STABLE_TORCH_LIBRARY_IMPL(JET_NAMESPACE, CPU, m) { m.impl(#op, &::jet::bindings::Boxed<&function>::call); }
#else
#define JET_REGISTER(op, function)                                                                            \
  STABLE_TORCH_LIBRARY_IMPL(JET_NAMESPACE, CPU, m) { m.impl(#op, &::jet::bindings::Boxed<&function>::call); } \
  STABLE_TORCH_LIBRARY_IMPL(JET_NAMESPACE, CUDA, m) { m.impl(#op, &::jet::bindings::Boxed<&function>::call); }
#endif

namespace jet::bindings {

// Arguments that stand side by side in several schemas are one parameter of the functions: an aggregate whose tie() is
// the std::tie of its members in that order. It may hold others of its kind.
template <class T>
concept ArgumentPack = requires(const T& pack) { pack.tie(); };

namespace detail {

template <class T>
constexpr std::size_t count_of() {
  if constexpr (ArgumentPack<T>)
    return std::tuple_size_v<decltype(std::declval<const T&>().tie())>;
  else
    return 1;
}

// How many arguments the parameters before number i take.
template <class... Parameters>
constexpr std::size_t count_before(std::size_t i) {
  const std::array<std::size_t, sizeof...(Parameters)> counts{count_of<Parameters>()...};
  std::size_t sum = 0;
  while (i > 0) sum += counts[--i];
  return sum;
}

template <class T, class... Members, std::size_t... I>
T take_members(StableIValue* stack, std::type_identity<std::tuple<const Members&...>>, std::index_sequence<I...>) {
  return {
      torch::stable::detail::to<Members>(stack[I])...};  // a pack in the pack takes as many as it has: brace elision
}

// The parameter that begins here.
template <class T>
T take(StableIValue* stack) {
  if constexpr (ArgumentPack<T>)
    return take_members<T>(stack, std::type_identity<decltype(std::declval<const T&>().tie())>(),
                           std::make_index_sequence<count_of<T>()>());
  else
    return torch::stable::detail::to<T>(*stack);
}

// The parameter's arguments from here on.
template <class T>
void put(StableIValue*& stack, const T& argument) {
  if constexpr (ArgumentPack<T>)
    std::apply([&](const auto&... members) { (put(stack, members), ...); }, argument.tie());
  else
    *stack++ = torch::stable::detail::from(argument);
}

template <class T>
struct Results {
  static constexpr std::size_t count = 1;
  static T take(StableIValue* stack) { return torch::stable::detail::to<T>(stack[0]); }
  static void put(StableIValue* stack, const T& result) { stack[0] = torch::stable::detail::from(result); }
};

template <class... Ts>
struct Results<std::tuple<Ts...>> {
  static constexpr std::size_t count = sizeof...(Ts);
  static std::tuple<Ts...> take(StableIValue* stack) { return torch::stable::detail::unbox_to_tuple<Ts...>(stack); }
  static void put(StableIValue* stack, const std::tuple<Ts...>& results) {
    torch::stable::detail::box_from_tuple<Ts...>(stack, results);
  }
};

template <>
struct Results<void> {
  static constexpr std::size_t count = 0;
  static void take(StableIValue*) {}
};

}  // namespace detail

// `function` as torch calls it: TORCH_BOX for functions with argument packs.
template <auto function>
struct Boxed;

template <class Result, class... Parameters, Result (*function)(Parameters...)>
struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
    constexpr std::size_t count = (detail::count_of<Parameters>() + ... + 0);
    STD_TORCH_CHECK(arguments == count && results == detail::Results<Result>::count, "the schema has ", arguments,
                    " arguments and ", results, " results, its function ", count, " and ",
                    detail::Results<Result>::count);
    if constexpr (std::is_void_v<Result>)
      call(stack, std::index_sequence_for<Parameters...>());
    else
      detail::Results<Result>::put(stack, call(stack, std::index_sequence_for<Parameters...>()));
  }

 private:
  template <std::size_t... I>
  static Result call(StableIValue* stack, std::index_sequence<I...>) {
    return function(detail::take<Parameters>(stack + detail::count_before<Parameters...>(I))...);
  }
};

// The plain PyTorch path: jet_plain::<op>(args..., reason), registered by jetkernels/ops.
template <class Result, class... Args>
Result call_plain(const char* qualified_op, PlainReason reason, const Args&... args) {
  constexpr std::size_t count = (detail::count_of<Args>() + ... + 1);
  std::array<StableIValue, std::max(count, detail::Results<Result>::count)> stack;
  StableIValue* next = stack.data();
  (detail::put(next, args), ...);
  detail::put(next, static_cast<int64_t>(reason));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(qualified_op, "", stack.data(), TORCH_ABI_VERSION));
  return detail::Results<Result>::take(stack.data());
}

}  // namespace jet::bindings
