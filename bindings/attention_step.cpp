// jet::attention_step: checks, allocation, dispatch. The caches are written only after every check has passed.
#include "csrc/attention/kernel_takes.h"

#include "bindings/arguments.h"
#include "bindings/backend.h"
#include "bindings/checks.h"
#include "bindings/launch_scope.h"
#include "bindings/registration.h"
#include "bindings/torch_parallel.h"

namespace jet::bindings {
namespace {

struct StepTensors {
  Tensor q, k, v, cos, sin, key, value, lengths;
  double scale;
  auto tie() const { return std::tie(q, k, v, cos, sin, key, value, lengths, scale); }
};

void check(Checks& checks, const StepTensors& t) {
  checks.shape("q", t.q, {"N", "H", "d"});
  checks.floating("q", t.q);
  checks.shape("k", t.k, {"N", "Hkv", "d"});
  checks.shape("v", t.v, {"N", "Hkv", "d"});
  const int64_t H = checks.size("H"), Hkv = checks.size("Hkv"), d = checks.size("d");
  if (Hkv == 0 ? H != 0 : H == 0 || H % Hkv != 0)
    checks.fail("q dimension 1 (H) must be a multiple of Hkv = ", Hkv, " (as in k), got ", H);
  if (d < 2 || d % 2 != 0) checks.fail("q dimension 2 (d) must be even and at least 2, got ", d);
  checks.shape("cos", t.cos, {"N", "d"});
  checks.shape("sin", t.sin, {"N", "d"});
  checks.shape("key", t.key, {"N", "Hkv", "L", "d"});
  checks.shape("value", t.value, {"N", "Hkv", "L", "d"});
  if (checks.size("L") < 1) checks.fail("key dimension 2 (L) must be at least 1, got 0");
  checks.shape("lengths", t.lengths, {"N"});
  checks.dtype_like("k", t.k, "q", t.q);
  checks.dtype_like("v", t.v, "q", t.q);
  checks.dtype("cos", t.cos, {ScalarType::Float});
  checks.dtype("sin", t.sin, {ScalarType::Float});
  checks.dtype_like("key", t.key, "q", t.q);
  checks.dtype_like("value", t.value, "q", t.q);
  checks.dtype("lengths", t.lengths, {ScalarType::Long});
  const Checks::Named inputs[] = {{"k", t.k},     {"v", t.v},         {"cos", t.cos},        {"sin", t.sin},
                                  {"key", t.key}, {"value", t.value}, {"lengths", t.lengths}};
  for (const Checks::Named& other : inputs) checks.device(other.name, *other.tensor, "q", t.q);
  checks.written({{"key", t.key}, {"value", t.value}},
                 {{"q", t.q}, {"k", t.k}, {"v", t.v}, {"cos", t.cos}, {"sin", t.sin}, {"lengths", t.lengths}});
}

// [N, heads, d]
TokenTensor heads(const Tensor& t) {
  return {.data = t.const_data_ptr(),
          .dtype = kernel_dtype(t),
          .strides = {.b = t.stride(0), .t = 0, .h = t.stride(1), .d = t.stride(2)}};
}

AttentionCache cache(const Tensor& t) {
  return {.data = const_cast<void*>(t.const_data_ptr()),
          .strides = {.n = t.stride(0), .h = t.stride(1), .l = t.stride(2), .d = t.stride(3)}};
}

AttentionStepParams params(const Checks& checks, const StepTensors& t, void* o) {
  return {.dtype = kernel_dtype(t.q),
          .N = checks.size("N"),
          .H = checks.size("H"),
          .Hkv = checks.size("Hkv"),
          .L = checks.size("L"),
          .D = checks.size("d"),
          .scale = t.scale,
          .q = heads(t.q),
          .k = heads(t.k),
          .v = heads(t.v),
          .cos = token_tensor(t.cos),
          .sin = token_tensor(t.sin),
          .key = cache(t.key),
          .value = cache(t.value),
          .lengths = static_cast<const int64_t*>(t.lengths.const_data_ptr()),
          .o = o};
}

Tensor attention_step(StepTensors t) {
  Checks checks("attention_step");
  check(checks, t);
  const int device = launch_device(t.q);
  if (const auto reason = plain_reason_of_call(device, attention_step_kernel_takes(params(checks, t, nullptr))))
    return call_plain<Tensor>("jet_plain::attention_step", *reason, t);
  Tensor o = allocate(t.q, t.q.sizes());
  t.lengths = dense(t.lengths);
  const AttentionStepParams p = params(checks, t, o.mutable_data_ptr());
  if (device == kHost) {
    attention_step_cpu(p, torch_parallel());
  } else if constexpr (kWithCuda) {
    const LaunchScope scope(t.q);
    const Tensor workspace = allocate(t.q, {attention_step_workspace(p)}, ScalarType::Float);
    attention_step_hopper(p, static_cast<float*>(workspace.mutable_data_ptr()), scope.stream());
  }
  return o;
}

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(attention_step, jet::bindings::attention_step)
