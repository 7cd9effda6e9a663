// jet::linear_int4: checks, allocation, dispatch.
#include "bindings/backend.h"
#include "bindings/launch_scope.h"
#include "bindings/linear_inputs.h"
#include "bindings/registration.h"
#include "bindings/torch_parallel.h"

namespace jet::bindings {
namespace {

Tensor linear_int4(Tensor x, Tensor weight, Tensor scale, OptionalTensor bias) {
  Checks checks("linear_int4");
  check_rows(checks, x);
  const int64_t C = checks.size("C");
  if (C % 2 != 0) checks.fail("x dimension ", x.dim() - 1, " (C) must be even, got ", C);
  checks.bind("C/2", C / 2, "from ", "x");
  checks.shape("weight", weight, {"P", "C/2"});
  checks.dtype("weight", weight, {ScalarType::Byte});
  checks.device("weight", weight, "x", x);
  check_scale(checks, x, scale, 2);
  check_bias(checks, x, bias);
  if (const auto reason = plain_reason_without_kernel(launch_device(x)))
    return call_plain<Tensor>("jet_plain::linear_int4", *reason, x, weight, scale, bias);
  x = in_rows(x), weight = with_dense_rows(weight), scale = dense(scale), bias = dense(bias);
  Tensor y = allocate_outputs(checks, x);
  linear_int4_cpu(linear_params(x, weight, scale, bias, y), torch_parallel());
  return y;
}

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(linear_int4, jet::bindings::linear_int4)
