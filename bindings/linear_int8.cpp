// jet::linear_int8: checks, allocation, dispatch.
#include "bindings/backend.h"
#include "bindings/launch_scope.h"
#include "bindings/linear_inputs.h"
#include "bindings/registration.h"
#include "bindings/torch_parallel.h"

namespace jet::bindings {
namespace {

Tensor linear_int8(Tensor x, Tensor weight, Tensor scale, OptionalTensor bias) {
  Checks checks("linear_int8");
  check_rows(checks, x);
  checks.shape("weight", weight, {"P", "C"});
  checks.dtype("weight", weight, {ScalarType::Char});
  checks.device("weight", weight, "x", x);
  check_scale(checks, x, scale, 1);
  check_bias(checks, x, bias);
  if (const auto reason = plain_reason_without_kernel(launch_device(x)))
    return call_plain<Tensor>("jet_plain::linear_int8", *reason, x, weight, scale, bias);
  x = in_rows(x), weight = with_dense_rows(weight), scale = dense(scale), bias = dense(bias);
  Tensor y = allocate_outputs(checks, x);
  linear_int8_cpu(linear_params(x, weight, scale, bias, y), torch_parallel());
  return y;
}

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(linear_int8, jet::bindings::linear_int8)
