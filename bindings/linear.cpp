// jet::linear: checks, allocation, dispatch.
#include "bindings/backend.h"
#include "bindings/launch_scope.h"
#include "bindings/linear_inputs.h"
#include "bindings/registration.h"
#include "bindings/torch_parallel.h"

namespace jet::bindings {
namespace {

Tensor linear(Tensor x, Tensor weight, OptionalTensor bias) {
  Checks checks("linear");
  check_rows(checks, x);
  checks.shape("weight", weight, {"P", "C"});
  checks.dtype_like("weight", weight, "x", x);
  checks.device("weight", weight, "x", x);
  check_bias(checks, x, bias);
  if (const auto reason = plain_reason_without_kernel(launch_device(x)))
    return call_plain<Tensor>("jet_plain::linear", *reason, x, weight, bias);
  x = in_rows(x), weight = with_dense_rows(weight), bias = dense(bias);
  Tensor y = allocate_outputs(checks, x);
  linear_cpu(linear_params(x, weight, std::nullopt, bias, y), torch_parallel());
  return y;
}

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(linear, jet::bindings::linear)
