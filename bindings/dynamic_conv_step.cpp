// jet::dynamic_conv_step: checks, allocation, dispatch. conv_state is written only after every check has passed.
#include "csrc/dynamic_conv/kernel_takes.h"

#include "bindings/backend.h"
#include "bindings/dynamic_conv_inputs.h"
#include "bindings/launch.h"
#include "bindings/parallel.h"
#include "bindings/registration.h"

namespace jet::bindings {
namespace {

Tensor dynamic_conv_step(Tensor x, Tensor hidden, Tensor weight, OptionalTensor bias, Tensor conv_state,
                         OptionalTensor state_indices, bool silu) {
  Checks checks("dynamic_conv_step");
  checks.shape("x", x, {"N", "D"});
  checks.floating("x", x);
  checks.shape("hidden", hidden, {"N", "R"});
  check_generator(checks, x, hidden, weight, bias);
  checks.shape("conv_state", conv_state, {"P", "D", "W-1"});
  check_like(checks, "conv_state", conv_state, "x", x);
  const std::vector<int64_t> rows = checks.state_rows(state_indices, "x", x);
  checks.written({{"conv_state", conv_state}},
                 {{"x", x}, {"hidden", hidden}, {"weight", weight}, {"bias", bias}, {"state_indices", state_indices}});
  const auto params = [&] {
    DynamicConvStepParams p{};
    p.dtype = kernel_dtype(x);
    p.N = checks.size("N"), p.D = checks.size("D"), p.R = checks.size("R"), p.W = checks.size("W"),
    p.P = checks.size("P");
    p.silu = silu;
    p.x = x.const_data_ptr();
    set_strides(x, p.x_stride);
    p.hidden = hidden.const_data_ptr();
    set_strides(hidden, p.hidden_stride);
    p.weight = weight.const_data_ptr();
    p.bias = data(bias);
    p.conv_state = const_cast<void*>(conv_state.const_data_ptr());
    set_strides(conv_state, p.state_stride);
    p.state_rows = data(state_indices);
    if (state_indices) p.state_rows_dtype = index_type(*state_indices);
    return p;
  };
  const int device = launch_device(x);
  if (const auto reason = plain_reason_of_call(device, dynamic_conv_kernel_takes(params())))
    return call_plain<Tensor>("jet_plain::dynamic_conv_step", *reason, x, hidden, weight, bias, conv_state,
                              state_indices, silu);
  Tensor y = allocate(x, {checks.size("N"), checks.size("D")});
  bias = dense(bias);
  if (device != kHost) {
    x = as_rows(x), hidden = as_rows(hidden), weight = aligned(weight), state_indices = dense(state_indices);
    DynamicConvStepParams p = params();
    p.y = y.mutable_data_ptr();
    if constexpr (kWithCuda) dynamic_conv_step_hopper(p, LaunchScope(x).stream());
    return y;
  }
  weight = dense(weight);
  DynamicConvStepParams p = params();
  if (state_indices) p.state_rows = rows.data(), p.state_rows_dtype = IndexType::i64;
  p.y = y.mutable_data_ptr();
  dynamic_conv_step_cpu(p, torch_parallel());
  return y;
}

const HasHopperKernel has_kernel("dynamic_conv_step");

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(dynamic_conv_step, jet::bindings::dynamic_conv_step)
