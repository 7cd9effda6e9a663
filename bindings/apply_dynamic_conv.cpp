// jet::apply_dynamic_conv and jet::apply_dynamic_conv_backward: checks, allocation, dispatch.
#include "csrc/dynamic_conv/apply/apply_dynamic_conv.h"

#include <tuple>

#include "bindings/backend.h"
#include "bindings/dynamic_conv_inputs.h"
#include "bindings/launch_scope.h"
#include "bindings/registration.h"
#include "bindings/torch_parallel.h"
#include "csrc/dynamic_conv/kernel_takes.h"

namespace jet::bindings {
namespace {

struct ApplyTensors {
  Tensor x, taps;  // `kernels` in the schema
  OptionalTensor conv_state, cu_seqlens;
  bool silu;
  auto tie() const { return std::tie(x, taps, conv_state, cu_seqlens, silu); }
};

struct ApplyBackwardTensors {
  ConvGradientTensors gradients;
  ApplyTensors forward;
  auto tie() const { return std::tuple_cat(gradients.tie(), forward.tie()); }
};

std::vector<int64_t> check(Checks& checks, const ApplyTensors& t) {
  checks.shape("x", t.x, {"B", "T", "D"});
  checks.floating("x", t.x);
  checks.shape("kernels", t.taps, {"B", "T", "D", "W"});
  check_like(checks, "kernels", t.taps, "x", t.x);
  check_channels(checks, "x", t.x);
  const int64_t W = t.taps.size(3);
  if (!is_number_of_taps(W)) checks.fail("kernels dimension 3 (W) must be in ", kMinTaps, "..", kMaxTaps, ", got ", W);
  checks.bind("W-1", W - 1, "from ", "kernels");
  return check_sequences(checks, t.x, t.conv_state, t.cu_seqlens);
}

ConvInputs inputs(const Checks& checks, const ApplyTensors& t, const IndexVector& cu_seqlens) {
  return conv_inputs(checks, t.x, t.conv_state, cu_seqlens, t.silu);
}

std::tuple<Tensor, Tensor> apply_dynamic_conv(ApplyTensors t) {
  Checks checks("apply_dynamic_conv");
  const std::vector<int64_t> offsets = check(checks, t);
  const int device = launch_device(t.x);
  const bool takes = apply_dynamic_conv_kernel_takes(inputs(checks, t, index_vector(t.cu_seqlens)));
  if (const auto reason = plain_reason_of_call(device, takes))
    return call_plain<std::tuple<Tensor, Tensor>>("jet_plain::apply_dynamic_conv", *reason, t);
  Tensor y = allocate(t.x, {checks.size("B"), checks.size("T"), checks.size("D")});
  Tensor conv_state_out = new_conv_state(checks, t.x);
  const auto params = [&](const IndexVector& cu_seqlens) {
    return ApplyDynamicConvParams{.in = inputs(checks, t, cu_seqlens),
                                  .taps = t.taps.const_data_ptr(),
                                  .y = y.mutable_data_ptr(),
                                  .conv_state_out = conv_state_out.mutable_data_ptr()};
  };
  if (device == kHost) {
    t.taps = dense(t.taps), t.conv_state = dense(t.conv_state);
    apply_dynamic_conv_cpu(params(index_vector(offsets)), torch_parallel());
  } else if constexpr (kWithCuda) {
    t.x = as_rows(t.x), t.taps = aligned(t.taps), t.conv_state = aligned(t.conv_state);
    t.cu_seqlens = dense(t.cu_seqlens);
    apply_dynamic_conv_hopper(params(index_vector(t.cu_seqlens)), LaunchScope(t.x).stream());
  }
  return {y, conv_state_out};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients apply_dynamic_conv_backward(ApplyBackwardTensors t) {
  Checks checks("apply_dynamic_conv_backward");
  ApplyTensors& forward = t.forward;
  const Tensor& x = forward.x;
  const std::vector<int64_t> offsets = check(checks, forward);
  check_gradients(checks, x, t.gradients);
  const int device = launch_device(x);
  const bool takes = apply_dynamic_conv_kernel_takes(inputs(checks, forward, index_vector(forward.cu_seqlens)));
  if (const auto reason = plain_reason_of_call(device, takes))
    return call_plain<Gradients>("jet_plain::apply_dynamic_conv_backward", *reason, t);
  const int64_t B = checks.size("B"), T = checks.size("T"), D = checks.size("D");
  Tensor dx = allocate(x, {B, T, D}), dtaps = allocate(x, {B, T, D, checks.size("W")});
  Tensor dconv_state = new_conv_state(checks, x);
  OptionalTensor& grad_conv_state_out = t.gradients.grad_conv_state_out;
  const auto params = [&](const IndexVector& cu_seqlens) {
    return ApplyDynamicConvBackwardParams{.in = inputs(checks, forward, cu_seqlens),
                                          .taps = forward.taps.const_data_ptr(),
                                          .grad_y = token_tensor(t.gradients.grad_y),
                                          .grad_conv_state_out = data(grad_conv_state_out),
                                          .dx = dx.mutable_data_ptr(),
                                          .dtaps = dtaps.mutable_data_ptr(),
                                          .dconv_state = dconv_state.mutable_data_ptr()};
  };
  if (device == kHost) {
    forward.taps = dense(forward.taps), forward.conv_state = dense(forward.conv_state);
    grad_conv_state_out = dense(grad_conv_state_out);
    apply_dynamic_conv_backward_cpu(params(index_vector(offsets)), torch_parallel());
  } else if constexpr (kWithCuda) {
    forward.x = as_rows(forward.x), forward.taps = aligned(forward.taps);
    forward.conv_state = aligned(forward.conv_state), forward.cu_seqlens = dense(forward.cu_seqlens);
    t.gradients.grad_y = as_rows(t.gradients.grad_y), grad_conv_state_out = aligned(grad_conv_state_out);
    apply_dynamic_conv_backward_hopper(params(index_vector(forward.cu_seqlens)), LaunchScope(forward.x).stream());
  }
  return {dx, dtaps, dconv_state};
}

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(apply_dynamic_conv, jet::bindings::apply_dynamic_conv)
JET_REGISTER(apply_dynamic_conv_backward, jet::bindings::apply_dynamic_conv_backward)
