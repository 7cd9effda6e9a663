// jet::dynamic_conv_step: checks, allocation, dispatch. conv_state is written only after every check has passed.
#include "csrc/dynamic_conv/step/dynamic_conv_step.h"

#include "bindings/backend.h"
#include "bindings/dynamic_conv_inputs.h"
#include "bindings/launch_scope.h"
#include "bindings/registration.h"
#include "bindings/torch_parallel.h"
#include "csrc/dynamic_conv/kernel_takes.h"

namespace jet::bindings {
namespace {

struct StepTensors {
  Tensor x;
  GeneratorTensors generator;
  Tensor conv_state;  // the pool
  OptionalTensor state_indices;
  bool silu;
  auto tie() const { return std::tuple_cat(std::tie(x), generator.tie(), std::tie(conv_state, state_indices, silu)); }
};

std::vector<int64_t> check(Checks& checks, const StepTensors& t) {
  checks.shape("x", t.x, {"N", "D"});
  checks.floating("x", t.x);
  checks.shape("hidden", t.generator.hidden, {"N", "R"});
  check_generator(checks, "x", t.x, t.generator);
  checks.shape("conv_state", t.conv_state, {"P", "D", "W-1"});
  check_like(checks, "conv_state", t.conv_state, "x", t.x);
  std::vector<int64_t> rows = checks.state_rows(t.state_indices, "x", t.x);
  checks.written({{"conv_state", t.conv_state}}, {{"x", t.x},
                                                  {"hidden", t.generator.hidden},
                                                  {"weight", t.generator.weight},
                                                  {"bias", t.generator.bias},
                                                  {"state_indices", t.state_indices}});
  checks.bind("B", checks.size("N"), "as N", "");
  checks.bind("T", 1, "as of a step", "");
  return rows;
}

DynamicConvStepParams params(const Checks& checks, const StepTensors& t, const IndexVector& rows) {
  const Tensor& state = t.conv_state;
  return {.in = conv_inputs(checks, t.x, std::nullopt, {}, t.silu),
          .generator = tap_generator(t.generator),
          .pool = pool(state, ConvStateStrides{state.stride(0), state.stride(1), state.stride(2)}, rows),
          .y = nullptr};
}

Tensor dynamic_conv_step(StepTensors t) {
  Checks checks("dynamic_conv_step");
  const std::vector<int64_t> rows = check(checks, t);
  DynamicConvStepParams p = params(checks, t, index_vector(t.state_indices));
  const int device = launch_device(t.x);
  if (const auto reason = plain_reason_of_call(device, dynamic_conv_step_kernel_takes(p.in, p.generator, p.pool)))
    return call_plain<Tensor>("jet_plain::dynamic_conv_step", *reason, t);
  Tensor y = allocate(t.x, {checks.size("N"), checks.size("D")});
  if (device == kHost) {
    t.generator = dense(t.generator);
    p = params(checks, t, index_vector(rows));
    p.y = y.mutable_data_ptr();
    dynamic_conv_step_cpu(p, torch_parallel());
  } else if constexpr (kWithCuda) {
    t.x = as_rows(t.x), t.generator = as_rows(t.generator), t.state_indices = dense(t.state_indices);
    p = params(checks, t, index_vector(t.state_indices));
    p.y = y.mutable_data_ptr();
    dynamic_conv_step_hopper(p, LaunchScope(t.x).stream());
  }
  return y;
}

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(dynamic_conv_step, jet::bindings::dynamic_conv_step)
