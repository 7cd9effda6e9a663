// jet::apply_dynamic_conv and jet::apply_dynamic_conv_backward: checks, allocation, dispatch.
#include "csrc/dynamic_conv/kernel_takes.h"

#include <tuple>

#include "bindings/backend.h"
#include "bindings/dynamic_conv_inputs.h"
#include "bindings/launch.h"
#include "bindings/parallel.h"
#include "bindings/registration.h"

namespace jet::bindings {
namespace {

std::vector<int64_t> check(Checks& checks, const Tensor& x, const Tensor& kernels, const OptionalTensor& conv_state,
                           const OptionalTensor& cu_seqlens) {
  checks.shape("x", x, {"B", "T", "D"});
  checks.floating("x", x);
  checks.shape("kernels", kernels, {"B", "T", "D", "W"});
  check_like(checks, "kernels", kernels, "x", x);
  const int64_t W = checks.size("W");
  check_channels(checks, x);
  if (W < 2 || W > kMaxTaps) checks.fail("kernels dimension 3 (W) must be in 2..", kMaxTaps, ", got ", W);
  checks.bind("W-1", W - 1, "from ", "kernels");
  return check_sequences(checks, x, conv_state, cu_seqlens);
}

std::tuple<Tensor, Tensor> apply_dynamic_conv(Tensor x, Tensor kernels, OptionalTensor conv_state,
                                              OptionalTensor cu_seqlens, bool silu) {
  Checks checks("apply_dynamic_conv");
  const std::vector<int64_t> offsets = check(checks, x, kernels, conv_state, cu_seqlens);
  ApplyDynamicConvParams p{};
  p.in = device_conv_inputs(checks, x, conv_state, cu_seqlens);
  p.silu = silu;
  const int device = launch_device(x);
  if (const auto reason = plain_reason_of_call(device, dynamic_conv_kernel_takes(p)))
    return call_plain<std::tuple<Tensor, Tensor>>("jet_plain::apply_dynamic_conv", *reason, x, kernels, conv_state,
                                                  cu_seqlens, silu);
  Tensor y = allocate(x, {checks.size("B"), checks.size("T"), checks.size("D")});
  Tensor conv_state_out = new_conv_state(checks, x);
  if (device != kHost) {
    x = as_rows(x), kernels = aligned(kernels), conv_state = aligned(conv_state), cu_seqlens = dense(cu_seqlens);
    p.in = device_conv_inputs(checks, x, conv_state, cu_seqlens);
  } else {
    kernels = dense(kernels), conv_state = dense(conv_state);
    p.in = conv_inputs(checks, x, conv_state, offsets);
  }
  p.kernels = kernels.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.conv_state_out = conv_state_out.mutable_data_ptr();
  if (device == kHost)
    apply_dynamic_conv_cpu(p, torch_parallel());
  else if constexpr (kWithCuda)
    apply_dynamic_conv_hopper(p, LaunchScope(x).stream());
  return {y, conv_state_out};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients apply_dynamic_conv_backward(Tensor grad_y, OptionalTensor grad_conv_state_out, Tensor x, Tensor kernels,
                                      OptionalTensor conv_state, OptionalTensor cu_seqlens, bool silu) {
  Checks checks("apply_dynamic_conv_backward");
  const std::vector<int64_t> offsets = check(checks, x, kernels, conv_state, cu_seqlens);
  check_gradients(checks, x, grad_y, grad_conv_state_out);
  if (const auto reason = plain_reason(launch_device(x), false))
    return call_plain<Gradients>("jet_plain::apply_dynamic_conv_backward", *reason, grad_y, grad_conv_state_out, x,
                                 kernels, conv_state, cu_seqlens, silu);
  kernels = dense(kernels), conv_state = dense(conv_state);
  grad_conv_state_out = dense(grad_conv_state_out);
  const int64_t B = checks.size("B"), T = checks.size("T"), D = checks.size("D");
  Tensor dx = allocate(x, {B, T, D}), dkernels = allocate(x, {B, T, D, checks.size("W")});
  Tensor dconv_state = new_conv_state(checks, x);
  ApplyDynamicConvBackwardParams p{};
  p.forward.in = conv_inputs(checks, x, conv_state, offsets);
  p.forward.silu = silu;
  p.forward.kernels = kernels.const_data_ptr();
  p.grad_y = grad_y.const_data_ptr();
  set_strides(grad_y, p.grad_y_stride);
  p.grad_conv_state_out = data(grad_conv_state_out);
  p.dx = dx.mutable_data_ptr();
  p.dkernels = dkernels.mutable_data_ptr();
  p.dconv_state = dconv_state.mutable_data_ptr();
  apply_dynamic_conv_backward_cpu(p, torch_parallel());
  return {dx, dkernels, dconv_state};
}

const HasHopperKernel has_kernel("apply_dynamic_conv");

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(apply_dynamic_conv, jet::bindings::apply_dynamic_conv)
JET_REGISTER(apply_dynamic_conv_backward, jet::bindings::apply_dynamic_conv_backward)
