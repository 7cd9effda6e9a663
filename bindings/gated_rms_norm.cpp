// jet::gated_rms_norm and jet::gated_rms_norm_backward: checks, allocation, dispatch.
#include <tuple>

#include "bindings/norm_inputs.h"
#include "bindings/registration.h"

namespace jet::bindings {
namespace {

struct GatedNormTensors {
  Tensor x, gate, weight;
  double eps;
  auto tie() const { return std::tie(x, gate, weight, eps); }
};

void check(Checks& checks, const GatedNormTensors& t) {
  check_rows(checks, t.x);
  checks.same("gate", t.gate, "x", t.x);
  check_norm_weight(checks, t.weight, t.x);
}

NormInputs inputs(const RowLayout& layout, const GatedNormTensors& t) {
  NormInputs in = layout.inputs(t.weight, t.eps);
  in.gate = layout.rows(t.gate);
  return in;
}

Tensor gated_rms_norm(GatedNormTensors t) {
  Checks checks("gated_rms_norm");
  check(checks, t);
  const int device = launch_device(t.x);
  if (const auto reason = plain_reason_of_call(device, kernel_takes(t.x)))
    return call_plain<Tensor>("jet_plain::gated_rms_norm", *reason, t);
  t.weight = norm_weight(device, t.weight, t.x);
  const RowLayout layout(row_alignment(device, t.x), {&t.x, &t.gate});
  Tensor y = allocate(t.x, t.x.sizes());
  run_norm(device, {.in = inputs(layout, t), .y = y.mutable_data_ptr(), .sum = nullptr}, t.x);
  return y;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

Gradients gated_rms_norm_backward(Tensor grad_y, GatedNormTensors t) {
  Checks checks("gated_rms_norm_backward");
  check(checks, t);
  checks.same("grad_y", grad_y, "x", t.x);
  const int device = launch_device(t.x);
  if (const auto reason = plain_reason_of_call(device, kernel_takes(t.x)))
    return call_plain<Gradients>("jet_plain::gated_rms_norm_backward", *reason, grad_y, t);
  const ScalarType weight_dtype = t.weight.scalar_type();
  t.weight = norm_weight(device, t.weight, t.x);
  grad_y = norm_gradient(device, grad_y);
  const RowLayout layout(row_alignment(device, t.x), {&t.x, &t.gate});
  Tensor dx = allocate(t.x, t.x.sizes()), dgate = allocate(t.x, t.x.sizes());
  Tensor dweight = allocate(t.weight, t.weight.sizes());
  run_norm_backward(device,
                    {.in = inputs(layout, t),
                     .grad_y = grad_y.const_data_ptr(),
                     .grad_sum = nullptr,
                     .dx = dx.mutable_data_ptr(),
                     .dresidual = nullptr,
                     .dgate = dgate.mutable_data_ptr(),
                     .dweight = dweight.mutable_data_ptr()},
                    t.x);
  return {dx, dgate, in_dtype(dweight, weight_dtype)};
}

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(gated_rms_norm, jet::bindings::gated_rms_norm)
JET_REGISTER(gated_rms_norm_backward, jet::bindings::gated_rms_norm_backward)
