// jet::rms_norm and jet::rms_norm_backward: checks, allocation, dispatch.
#include <tuple>

#include "bindings/norm_inputs.h"
#include "bindings/registration.h"

namespace jet::bindings {
namespace {

void check(Checks& checks, const Tensor& x, const Tensor& weight) {
  check_rows(checks, x);
  check_norm_weight(checks, weight, x);
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  Checks checks("rms_norm");
  check(checks, x, weight);
  const int device = launch_device(x);
  if (const auto reason = plain_reason_of_call(device, kernel_takes(x)))
    return call_plain<Tensor>("jet_plain::rms_norm", *reason, x, weight, eps);
  weight = norm_weight(device, weight, x);
  const RowLayout layout(row_alignment(device, x), {&x});
  Tensor y = allocate(x, x.sizes());
  run_norm(device, {.in = layout.inputs(weight, eps), .y = y.mutable_data_ptr(), .sum = nullptr}, x);
  return y;
}

using Gradients = std::tuple<Tensor, Tensor>;

Gradients rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, double eps) {
  Checks checks("rms_norm_backward");
  check(checks, x, weight);
  checks.same("grad_y", grad_y, "x", x);
  const int device = launch_device(x);
  if (const auto reason = plain_reason_of_call(device, kernel_takes(x)))
    return call_plain<Gradients>("jet_plain::rms_norm_backward", *reason, grad_y, x, weight, eps);
  const ScalarType weight_dtype = weight.scalar_type();
  weight = norm_weight(device, weight, x);
  grad_y = norm_gradient(device, grad_y);
  const RowLayout layout(row_alignment(device, x), {&x});
  Tensor dx = allocate(x, x.sizes()), dweight = allocate(weight, weight.sizes());
  run_norm_backward(device,
                    {.in = layout.inputs(weight, eps),
                     .grad_y = grad_y.const_data_ptr(),
                     .grad_sum = nullptr,
                     .dx = dx.mutable_data_ptr(),
                     .dresidual = nullptr,
                     .dgate = nullptr,
                     .dweight = dweight.mutable_data_ptr()},
                    x);
  return {dx, in_dtype(dweight, weight_dtype)};
}

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(rms_norm, jet::bindings::rms_norm)
JET_REGISTER(rms_norm_backward, jet::bindings::rms_norm_backward)
