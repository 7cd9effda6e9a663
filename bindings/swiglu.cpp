// jet::swiglu and jet::swiglu_backward: checks, allocation, dispatch.
#include "csrc/pointwise/swiglu.h"

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

void check(const Checks& checks, const Tensor& gate, const Tensor& up) {
  checks.rows("gate", gate);
  checks.floating("gate", gate);
  checks.same("up", up, "gate", gate);
}

// Contiguous tensors are one long row.
template <class Params, class... Tensors>
Params sizes_of(const Tensor& gate, const Tensors&... others) {
  Params p{};
  p.dtype = kernel_dtype(gate), p.rows = 1, p.C = gate.numel();
  if (gate.is_contiguous() && (others.is_contiguous() && ...)) return p;
  p.C = gate.size(gate.dim() - 1), p.rows = row_count(gate);
  return p;
}

Tensor swiglu(Tensor gate, Tensor up) {
  const Checks checks("swiglu");
  check(checks, gate, up);
  const int device = launch_device(gate);
  if (const auto reason = plain_reason_of_call(device, swiglu_kernel_takes(kernel_dtype(gate))))
    return call_plain<Tensor>("jet_plain::swiglu", *reason, gate, up);
  gate = in_rows(gate), up = in_rows(up);
  Tensor y = allocate(gate, gate.sizes());
  auto p = sizes_of<SwigluParams>(gate, up);
  p.gate = strided_rows(gate), p.up = strided_rows(up), p.y = y.mutable_data_ptr();
  if (device == kHost)
    swiglu_cpu(p, torch_parallel());
  else if constexpr (kWithCuda)
    swiglu_hopper(p, LaunchScope(gate).stream());
  return y;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor grad_y, Tensor gate, Tensor up) {
  const Checks checks("swiglu_backward");
  check(checks, gate, up);
  checks.same("grad_y", grad_y, "gate", gate);
  const int device = launch_device(gate);
  if (const auto reason = plain_reason_of_call(device, swiglu_kernel_takes(kernel_dtype(gate))))
    return call_plain<std::tuple<Tensor, Tensor>>("jet_plain::swiglu_backward", *reason, grad_y, gate, up);
  grad_y = in_rows(grad_y), gate = in_rows(gate), up = in_rows(up);
  Tensor dgate = allocate(gate, gate.sizes()), dup = allocate(gate, gate.sizes());
  auto p = sizes_of<SwigluBackwardParams>(gate, up, grad_y);
  p.grad_y = strided_rows(grad_y), p.gate = strided_rows(gate), p.up = strided_rows(up);
  p.dgate = dgate.mutable_data_ptr(), p.dup = dup.mutable_data_ptr();
  if (device == kHost)
    swiglu_backward_cpu(p, torch_parallel());
  else if constexpr (kWithCuda)
    swiglu_backward_hopper(p, LaunchScope(gate).stream());
  return {dgate, dup};
}

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(swiglu, jet::bindings::swiglu)
JET_REGISTER(swiglu_backward, jet::bindings::swiglu_backward)
