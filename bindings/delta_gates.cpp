// jet::delta_gates and jet::delta_gates_backward: checks, allocation, dispatch.
#include "csrc/pointwise/delta_gates.h"

#include <tuple>

#include "bindings/arguments.h"
#include "bindings/backend.h"
#include "bindings/checks.h"
#include "bindings/launch_scope.h"
#include "bindings/registration.h"
#include "bindings/row_tensors.h"
#include "bindings/torch_parallel.h"

namespace jet::bindings {
namespace {

struct GateTensors {
  Tensor a, b, A_log, dt_bias;
  auto tie() const { return std::tie(a, b, A_log, dt_bias); }
};

struct GateGradients {
  Tensor grad_g;
  OptionalTensor grad_beta;
  auto tie() const { return std::tie(grad_g, grad_beta); }
};

// Dtype of the arithmetic and of the gates.
ScalarType real_dtype(const GateTensors& t) {
  return t.a.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check(Checks& checks, const GateTensors& t) {
  checks.rows("a", t.a);
  checks.floating("a", t.a);
  checks.same("b", t.b, "a", t.a);
  checks.bind("H", t.a.size(t.a.dim() - 1), "as in ", "a");
  for (const auto& [name, parameter] : {std::pair("A_log", &t.A_log), std::pair("dt_bias", &t.dt_bias)}) {
    checks.shape(name, *parameter, {"H"});
    checks.dtype_like_or_fp32(name, *parameter, "a", t.a);
    checks.device(name, *parameter, "a", t.a);
  }
}

void check_gradient(const Checks& checks, const char* name, const Tensor& grad, const GateTensors& t) {
  checks.shape_like(name, grad, "a", t.a);
  checks.dtype(name, grad, {real_dtype(t)});
  checks.device(name, grad, "a", t.a);
}

// The parameters as the arithmetic takes them; they are fp32 or fp64 but by a caller's wish.
void make_real(GateTensors& t) {
  t.A_log = dense(in_dtype(t.A_log, real_dtype(t))), t.dt_bias = dense(in_dtype(t.dt_bias, real_dtype(t)));
}

DeltaGatesInputs sizes_of(const GateTensors& t) {
  DeltaGatesInputs in{};
  in.dtype = kernel_dtype(t.a), in.tokens = row_count(t.a), in.H = t.a.size(t.a.dim() - 1);
  return in;
}

DeltaGatesInputs inputs(const GateTensors& t) {
  DeltaGatesInputs in = sizes_of(t);
  in.a = strided_rows(t.a), in.b = strided_rows(t.b);
  in.A_log = t.A_log.const_data_ptr(), in.dt_bias = t.dt_bias.const_data_ptr();
  return in;
}

std::tuple<Tensor, Tensor> delta_gates(GateTensors t) {
  Checks checks("delta_gates");
  check(checks, t);
  const int device = launch_device(t.a);
  if (const auto reason = plain_reason_of_call(device, delta_gates_kernel_takes(sizes_of(t))))
    return call_plain<std::tuple<Tensor, Tensor>>("jet_plain::delta_gates", *reason, t);
  t.a = in_rows(t.a), t.b = in_rows(t.b);
  make_real(t);
  Tensor g = allocate(t.a, t.a.sizes(), real_dtype(t)), beta = allocate(t.a, t.a.sizes(), real_dtype(t));
  const DeltaGatesParams p{.in = inputs(t), .g = g.mutable_data_ptr(), .beta = beta.mutable_data_ptr()};
  if (device == kHost)
    delta_gates_cpu(p, torch_parallel());
  else if constexpr (kWithCuda)
    delta_gates_hopper(p, LaunchScope(t.a).stream());
  return {g, beta};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients delta_gates_backward(GateGradients grads, GateTensors t) {
  Checks checks("delta_gates_backward");
  check(checks, t);
  check_gradient(checks, "grad_g", grads.grad_g, t);
  if (grads.grad_beta) check_gradient(checks, "grad_beta", *grads.grad_beta, t);
  const int device = launch_device(t.a);
  if (const auto reason = plain_reason_of_call(device, delta_gates_kernel_takes(sizes_of(t))))
    return call_plain<Gradients>("jet_plain::delta_gates_backward", *reason, grads, t);
  const ScalarType A_log_dtype = t.A_log.scalar_type(), dt_bias_dtype = t.dt_bias.scalar_type();
  t.a = in_rows(t.a), t.b = in_rows(t.b), grads.grad_g = in_rows(grads.grad_g);
  if (grads.grad_beta) grads.grad_beta = in_rows(*grads.grad_beta);
  make_real(t);
  Tensor da = allocate(t.a, t.a.sizes()), db = allocate(t.a, t.a.sizes());
  Tensor dA_log = allocate(t.A_log, t.A_log.sizes()), ddt_bias = allocate(t.A_log, t.A_log.sizes());
  const DeltaGatesBackwardParams p{.in = inputs(t),
                                   .grad_g = strided_rows(grads.grad_g),
                                   .grad_beta = grads.grad_beta ? strided_rows(*grads.grad_beta) : StridedRows{},
                                   .da = da.mutable_data_ptr(),
                                   .db = db.mutable_data_ptr(),
                                   .dA_log = dA_log.mutable_data_ptr(),
                                   .ddt_bias = ddt_bias.mutable_data_ptr()};
  if (device == kHost) {
    delta_gates_backward_cpu(p, torch_parallel());
  } else if constexpr (kWithCuda) {
    const LaunchScope scope(t.a);
    const Tensor workspace = allocate(t.a, {delta_gates_backward_workspace(p.in)}, ScalarType::Float);
    delta_gates_backward_hopper(p, static_cast<float*>(workspace.mutable_data_ptr()), scope.stream());
  }
  return {da, db, in_dtype(dA_log, A_log_dtype), in_dtype(ddt_bias, dt_bias_dtype)};
}

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(delta_gates, jet::bindings::delta_gates)
JET_REGISTER(delta_gates_backward, jet::bindings::delta_gates_backward)
