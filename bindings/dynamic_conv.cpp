// jet::dynamic_conv and jet::dynamic_conv_backward: checks, allocation, dispatch.
#include "csrc/dynamic_conv/prefill/dynamic_conv.h"

#include <tuple>

#include "bindings/backend.h"
#include "bindings/dynamic_conv_inputs.h"
#include "bindings/launch_scope.h"
#include "bindings/registration.h"
#include "bindings/torch_parallel.h"
#include "csrc/dynamic_conv/kernel_takes.h"

namespace jet::bindings {
namespace {

struct DynamicConvTensors {
  Tensor x;
  GeneratorTensors generator;
  OptionalTensor conv_state, cu_seqlens;
  bool silu;
  auto tie() const { return std::tuple_cat(std::tie(x), generator.tie(), std::tie(conv_state, cu_seqlens, silu)); }
};

struct DynamicConvBackwardTensors {
  ConvGradientTensors gradients;
  DynamicConvTensors forward;
  auto tie() const { return std::tuple_cat(gradients.tie(), forward.tie()); }
};

std::vector<int64_t> check(Checks& checks, const DynamicConvTensors& t) {
  checks.shape("x", t.x, {"B", "T", "D"});
  checks.floating("x", t.x);
  checks.shape("hidden", t.generator.hidden, {"B", "T", "R"});
  check_generator(checks, "x", t.x, t.generator);
  return check_sequences(checks, t.x, t.conv_state, t.cu_seqlens);
}

ConvInputs inputs(const Checks& checks, const DynamicConvTensors& t, const IndexVector& cu_seqlens) {
  return conv_inputs(checks, t.x, t.conv_state, cu_seqlens, t.silu);
}

std::tuple<Tensor, Tensor> dynamic_conv(DynamicConvTensors t) {
  Checks checks("dynamic_conv");
  const std::vector<int64_t> offsets = check(checks, t);
  const int device = launch_device(t.x);
  const bool takes =
      dynamic_conv_kernel_takes(inputs(checks, t, index_vector(t.cu_seqlens)), tap_generator(t.generator));
  if (const auto reason = plain_reason_of_call(device, takes))
    return call_plain<std::tuple<Tensor, Tensor>>("jet_plain::dynamic_conv", *reason, t);
  Tensor y = allocate(t.x, {checks.size("B"), checks.size("T"), checks.size("D")});
  Tensor conv_state_out = new_conv_state(checks, t.x);
  const auto params = [&](const IndexVector& cu_seqlens) {
    return DynamicConvParams{.in = inputs(checks, t, cu_seqlens),
                             .generator = tap_generator(t.generator),
                             .y = y.mutable_data_ptr(),
                             .conv_state_out = conv_state_out.mutable_data_ptr()};
  };
  if (device == kHost) {
    t.generator = dense(t.generator), t.conv_state = dense(t.conv_state);
    dynamic_conv_cpu(params(index_vector(offsets)), torch_parallel());
  } else if constexpr (kWithCuda) {
    t.x = as_rows(t.x), t.generator = as_rows(t.generator), t.conv_state = aligned(t.conv_state);
    t.cu_seqlens = dense(t.cu_seqlens);
    dynamic_conv_hopper(params(index_vector(t.cu_seqlens)), LaunchScope(t.x).stream());
  }
  return {y, conv_state_out};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients dynamic_conv_backward(DynamicConvBackwardTensors t) {
  Checks checks("dynamic_conv_backward");
  DynamicConvTensors& forward = t.forward;
  const Tensor& x = forward.x;
  const std::vector<int64_t> offsets = check(checks, forward);
  check_gradients(checks, x, t.gradients);
  const int device = launch_device(x);
  const bool takes = dynamic_conv_kernel_takes(inputs(checks, forward, index_vector(forward.cu_seqlens)),
                                               tap_generator(forward.generator));
  if (const auto reason = plain_reason_of_call(device, takes))
    return call_plain<Gradients>("jet_plain::dynamic_conv_backward", *reason, t);
  const int64_t B = checks.size("B"), T = checks.size("T"), R = checks.size("R"), rows = checks.size("D*W");
  Tensor dx = allocate(x, {B, T, checks.size("D")}), dhidden = allocate(x, {B, T, R});
  Tensor dweight = allocate(x, {rows, R}), dbias = allocate(x, {rows});
  Tensor dconv_state = new_conv_state(checks, x);
  OptionalTensor& grad_conv_state_out = t.gradients.grad_conv_state_out;
  const auto params = [&](const IndexVector& cu_seqlens) {
    return DynamicConvBackwardParams{.in = inputs(checks, forward, cu_seqlens),
                                     .generator = tap_generator(forward.generator),
                                     .grad_y = token_tensor(t.gradients.grad_y),
                                     .grad_conv_state_out = data(grad_conv_state_out),
                                     .dx = dx.mutable_data_ptr(),
                                     .dhidden = dhidden.mutable_data_ptr(),
                                     .dweight = dweight.mutable_data_ptr(),
                                     .dbias = dbias.mutable_data_ptr(),
                                     .dconv_state = dconv_state.mutable_data_ptr()};
  };
  if (device == kHost) {
    forward.generator = dense(forward.generator), forward.conv_state = dense(forward.conv_state);
    grad_conv_state_out = dense(grad_conv_state_out);
    dynamic_conv_backward_cpu(params(index_vector(offsets)), torch_parallel());
  } else if constexpr (kWithCuda) {
    forward.x = as_rows(forward.x), forward.generator = as_rows(forward.generator);
    forward.conv_state = aligned(forward.conv_state), forward.cu_seqlens = dense(forward.cu_seqlens);
    t.gradients.grad_y = as_rows(t.gradients.grad_y), grad_conv_state_out = aligned(grad_conv_state_out);
    const DynamicConvBackwardParams p = params(index_vector(forward.cu_seqlens));
    const LaunchScope scope(forward.x);
    const Tensor workspace = allocate(x, {dynamic_conv_backward_workspace(p)}, ScalarType::Byte);
    dynamic_conv_backward_hopper(p, workspace.mutable_data_ptr(), scope.stream());
  }
  return {dx, dhidden, dweight, dbias, dconv_state};
}

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(dynamic_conv, jet::bindings::dynamic_conv)
JET_REGISTER(dynamic_conv_backward, jet::bindings::dynamic_conv_backward)
