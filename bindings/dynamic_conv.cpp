// jet::dynamic_conv and jet::dynamic_conv_backward: checks, allocation, dispatch.
#include "csrc/dynamic_conv/kernel_takes.h"

#include <tuple>

#include "bindings/backend.h"
#include "bindings/dynamic_conv_inputs.h"
#include "bindings/launch.h"
#include "bindings/parallel.h"
#include "bindings/registration.h"

namespace jet::bindings {
namespace {

std::vector<int64_t> check(Checks& checks, const Tensor& x, const Tensor& hidden, const Tensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& conv_state,
                           const OptionalTensor& cu_seqlens) {
  checks.shape("x", x, {"B", "T", "D"});
  checks.floating("x", x);
  checks.shape("hidden", hidden, {"B", "T", "R"});
  check_generator(checks, x, hidden, weight, bias);
  return check_sequences(checks, x, conv_state, cu_seqlens);
}

DynamicConvParams params(const Checks& checks, const ConvInputs& in, const Tensor& hidden, const Tensor& weight,
                         const OptionalTensor& bias, bool silu) {
  DynamicConvParams p{};
  p.in = in;
  p.R = checks.size("R");
  p.silu = silu;
  p.hidden = hidden.const_data_ptr();
  set_strides(hidden, p.hidden_stride);
  p.weight = weight.const_data_ptr();
  p.bias = data(bias);
  return p;
}

std::tuple<Tensor, Tensor> dynamic_conv(Tensor x, Tensor hidden, Tensor weight, OptionalTensor bias,
                                        OptionalTensor conv_state, OptionalTensor cu_seqlens, bool silu) {
  Checks checks("dynamic_conv");
  const std::vector<int64_t> offsets = check(checks, x, hidden, weight, bias, conv_state, cu_seqlens);
  DynamicConvParams p =
      params(checks, device_conv_inputs(checks, x, conv_state, cu_seqlens), hidden, weight, bias, silu);
  const int device = launch_device(x);
  if (const auto reason = plain_reason_of_call(device, dynamic_conv_kernel_takes(p)))
    return call_plain<std::tuple<Tensor, Tensor>>("jet_plain::dynamic_conv", *reason, x, hidden, weight, bias,
                                                  conv_state, cu_seqlens, silu);
  Tensor y = allocate(x, {checks.size("B"), checks.size("T"), checks.size("D")});
  Tensor conv_state_out = new_conv_state(checks, x);
  if (device != kHost) {
    x = as_rows(x), hidden = as_rows(hidden), weight = aligned(weight), bias = dense(bias),
    conv_state = aligned(conv_state);
    cu_seqlens = dense(cu_seqlens);
    p = params(checks, device_conv_inputs(checks, x, conv_state, cu_seqlens), hidden, weight, bias, silu);
  } else {
    weight = dense(weight), bias = dense(bias), conv_state = dense(conv_state);
    p = params(checks, conv_inputs(checks, x, conv_state, offsets), hidden, weight, bias, silu);
  }
  p.y = y.mutable_data_ptr();
  p.conv_state_out = conv_state_out.mutable_data_ptr();
  if (device == kHost)
    dynamic_conv_cpu(p, torch_parallel());
  else if constexpr (kWithCuda)
    dynamic_conv_hopper(p, LaunchScope(x).stream());
  return {y, conv_state_out};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients dynamic_conv_backward(Tensor grad_y, OptionalTensor grad_conv_state_out, Tensor x, Tensor hidden,
                                Tensor weight, OptionalTensor bias, OptionalTensor conv_state,
                                OptionalTensor cu_seqlens, bool silu) {
  Checks checks("dynamic_conv_backward");
  const std::vector<int64_t> offsets = check(checks, x, hidden, weight, bias, conv_state, cu_seqlens);
  check_gradients(checks, x, grad_y, grad_conv_state_out);
  if (const auto reason = plain_reason(launch_device(x), false))
    return call_plain<Gradients>("jet_plain::dynamic_conv_backward", *reason, grad_y, grad_conv_state_out, x, hidden,
                                 weight, bias, conv_state, cu_seqlens, silu);
  weight = dense(weight), bias = dense(bias), conv_state = dense(conv_state);
  grad_conv_state_out = dense(grad_conv_state_out);
  const int64_t B = checks.size("B"), T = checks.size("T"), R = checks.size("R"), rows = checks.size("D*W");
  Tensor dx = allocate(x, {B, T, checks.size("D")}), dhidden = allocate(x, {B, T, R});
  Tensor dweight = allocate(x, {rows, R}), dbias = allocate(x, {rows});
  Tensor dconv_state = new_conv_state(checks, x);
  DynamicConvBackwardParams p{};
  p.forward = params(checks, conv_inputs(checks, x, conv_state, offsets), hidden, weight, bias, silu);
  p.grad_y = grad_y.const_data_ptr();
  set_strides(grad_y, p.grad_y_stride);
  p.grad_conv_state_out = data(grad_conv_state_out);
  p.dx = dx.mutable_data_ptr();
  p.dhidden = dhidden.mutable_data_ptr();
  p.dweight = dweight.mutable_data_ptr();
  p.dbias = dbias.mutable_data_ptr();
  p.dconv_state = dconv_state.mutable_data_ptr();
  dynamic_conv_backward_cpu(p, torch_parallel());
  return {dx, dhidden, dweight, dbias, dconv_state};
}

const HasHopperKernel has_kernel("dynamic_conv");

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(dynamic_conv, jet::bindings::dynamic_conv)
JET_REGISTER(dynamic_conv_backward, jet::bindings::dynamic_conv_backward)
