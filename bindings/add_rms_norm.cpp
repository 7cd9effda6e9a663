// jet::add_rms_norm and jet::add_rms_norm_backward: checks, allocation, dispatch.
#include <tuple>

#include "bindings/norm_inputs.h"
#include "bindings/registration.h"

namespace jet::bindings {
namespace {

struct AddNormTensors {
  Tensor x, residual, weight;
  double eps;
  auto tie() const { return std::tie(x, residual, weight, eps); }
};

void check(Checks& checks, const AddNormTensors& t) {
  check_rows(checks, t.x);
  checks.same("residual", t.residual, "x", t.x);
  check_norm_weight(checks, t.weight, t.x);
}

NormInputs inputs(const RowLayout& layout, const AddNormTensors& t) {
  NormInputs in = layout.inputs(t.weight, t.eps);
  in.residual = layout.rows(t.residual);
  return in;
}

std::tuple<Tensor, Tensor> add_rms_norm(AddNormTensors t) {
  Checks checks("add_rms_norm");
  check(checks, t);
  const int device = launch_device(t.x);
  if (const auto reason = plain_reason_of_call(device, kernel_takes(t.x)))
    return call_plain<std::tuple<Tensor, Tensor>>("jet_plain::add_rms_norm", *reason, t);
  t.weight = norm_weight(device, t.weight, t.x);
  const RowLayout layout(row_alignment(device, t.x), {&t.x, &t.residual});
  Tensor y = allocate(t.x, t.x.sizes()), sum = allocate(t.x, t.x.sizes());
  run_norm(device, {.in = inputs(layout, t), .y = y.mutable_data_ptr(), .sum = sum.mutable_data_ptr()}, t.x);
  return {y, sum};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients add_rms_norm_backward(Tensor grad_y, OptionalTensor grad_sum, AddNormTensors t) {
  Checks checks("add_rms_norm_backward");
  check(checks, t);
  checks.same("grad_y", grad_y, "x", t.x);
  if (grad_sum) checks.same("grad_sum", *grad_sum, "x", t.x);
  const int device = launch_device(t.x);
  if (const auto reason = plain_reason_of_call(device, kernel_takes(t.x)))
    return call_plain<Gradients>("jet_plain::add_rms_norm_backward", *reason, grad_y, grad_sum, t);
  const ScalarType weight_dtype = t.weight.scalar_type();
  t.weight = norm_weight(device, t.weight, t.x);
  grad_y = norm_gradient(device, grad_y);
  if (grad_sum) grad_sum = norm_gradient(device, *grad_sum);
  const RowLayout layout(row_alignment(device, t.x), {&t.x, &t.residual});
  Tensor dx = allocate(t.x, t.x.sizes()), dresidual = allocate(t.x, t.x.sizes());
  Tensor dweight = allocate(t.weight, t.weight.sizes());
  run_norm_backward(device,
                    {.in = inputs(layout, t),
                     .grad_y = grad_y.const_data_ptr(),
                     .grad_sum = grad_sum ? grad_sum->const_data_ptr() : nullptr,
                     .dx = dx.mutable_data_ptr(),
                     .dresidual = dresidual.mutable_data_ptr(),
                     .dgate = nullptr,
                     .dweight = dweight.mutable_data_ptr()},
                    t.x);
  return {dx, dresidual, in_dtype(dweight, weight_dtype)};
}

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(add_rms_norm, jet::bindings::add_rms_norm)
JET_REGISTER(add_rms_norm_backward, jet::bindings::add_rms_norm_backward)
