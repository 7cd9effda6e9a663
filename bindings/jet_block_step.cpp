// jet::jet_block_step: checks, allocation, dispatch. The states are written only after every check has passed.
#include "csrc/jet_block_step/jet_block_step.h"

#include <initializer_list>
#include <vector>

#include "bindings/backend.h"
#include "bindings/dynamic_conv_inputs.h"
#include "bindings/launch_scope.h"
#include "bindings/recurrent_inputs.h"
#include "bindings/registration.h"
#include "bindings/torch_parallel.h"
#include "csrc/jet_block_step/kernel_takes.h"

namespace jet::bindings {
namespace {

struct JetBlockStepTensors {
  Tensor q, k, v, hidden, a, b, gate, weight;
  OptionalTensor bias;
  Tensor A_log, dt_bias, norm_weight, conv_state, state;
  OptionalTensor state_indices;
  double scale, eps;
  auto tie() const {
    return std::tie(q, k, v, hidden, a, b, gate, weight, bias, A_log, dt_bias, norm_weight, conv_state, state,
                    state_indices, scale, eps);
  }
  GeneratorTensors generator() const { return {.hidden = hidden, .weight = weight, .bias = bias}; }
};

// A parameter in the dtype of q, or in fp32 where that is narrower.
void check_parameter(Checks& checks, const char* name, const Tensor& t, const char* dim, const Tensor& q) {
  checks.shape(name, t, {dim});
  if (q.scalar_type() == ScalarType::Double || q.scalar_type() == ScalarType::Float)
    checks.dtype(name, t, {q.scalar_type()});
  else
    checks.dtype(name, t, {ScalarType::Float, q.scalar_type()});
  checks.device(name, t, "q", q);
}

std::vector<int64_t> check(Checks& checks, const JetBlockStepTensors& t) {
  checks.shape("q", t.q, {"N", "H", "K"});
  checks.floating("q", t.q);
  checks.shape("k", t.k, {"N", "H", "K"});
  check_like(checks, "k", t.k, "q", t.q);
  checks.shape("v", t.v, {"N", "D"});
  check_like(checks, "v", t.v, "q", t.q);
  checks.shape("hidden", t.hidden, {"N", "R"});
  check_generator(checks, "v", t.v, t.generator());
  checks.shape("a", t.a, {"N", "H"});
  check_like(checks, "a", t.a, "q", t.q);
  checks.shape("b", t.b, {"N", "H"});
  check_like(checks, "b", t.b, "q", t.q);
  checks.shape("gate", t.gate, {"N", "H", "V"});
  check_like(checks, "gate", t.gate, "q", t.q);
  const int64_t H = checks.size("H"), V = checks.size("V"), D = checks.size("D");
  if (checks.size("K") < 1) checks.fail("q dimension 2 (K) must be at least 1, got 0");
  if (D != H * V) checks.fail("v dimension 1 (D) must be H*V = ", H, "*", V, " (as in gate), got ", D);
  check_parameter(checks, "A_log", t.A_log, "H", t.q);
  check_parameter(checks, "dt_bias", t.dt_bias, "H", t.q);
  check_parameter(checks, "norm_weight", t.norm_weight, "V", t.q);
  checks.shape("conv_state", t.conv_state, {"P", "D", "W-1"});
  check_like(checks, "conv_state", t.conv_state, "q", t.q);
  std::vector<int64_t> rows = check_pool(checks, {t.state, t.state_indices}, "q", t.q);
  const std::initializer_list<Checks::Named> read = {{"q", t.q},
                                                     {"k", t.k},
                                                     {"v", t.v},
                                                     {"hidden", t.hidden},
                                                     {"a", t.a},
                                                     {"b", t.b},
                                                     {"gate", t.gate},
                                                     {"weight", t.weight},
                                                     {"bias", t.bias},
                                                     {"A_log", t.A_log},
                                                     {"dt_bias", t.dt_bias},
                                                     {"norm_weight", t.norm_weight},
                                                     {"state_indices", t.state_indices}};
  checks.written({{"conv_state", t.conv_state}, {"state", t.state}}, read);
  checks.bind("B", checks.size("N"), "as N", "");
  checks.bind("T", 1, "as of a step", "");
  return rows;
}

// [N, H, D] or [N, H] as the tokens [N, 1, H, D] of a step
TokenTensor head_tensor(const Tensor& t) {
  return {.data = t.const_data_ptr(),
          .dtype = kernel_dtype(t),
          .strides = {.b = t.stride(0), .t = 0, .h = t.stride(1), .d = t.dim() == 3 ? t.stride(2) : 0}};
}

NumberVector number_vector(const Tensor& t) { return {.data = t.const_data_ptr(), .dtype = kernel_dtype(t)}; }

// [N, H, V] whose heads the norm's kernel reads 16 bytes at a time: `t` if they are aligned, else a copy.
Tensor head_rows(const Tensor& t) {
  const bool rows = t.stride(2) == 1 && t.stride(0) % 8 == 0 && t.stride(1) % 8 == 0 &&
                    reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  return rows ? t : aligned(t);
}

// All but the outputs.
JetBlockStepParams params(const Checks& checks, const JetBlockStepTensors& t, const IndexVector& rows) {
  const Tensor& conv = t.conv_state;
  return {.conv = {.in = conv_inputs(checks, t.v, std::nullopt, {}, true),
                   .generator = tap_generator(t.generator()),
                   .pool = pool(conv, ConvStateStrides{conv.stride(0), conv.stride(1), conv.stride(2)}, rows),
                   .y = nullptr},
          .recurrent = {.in = {.B = checks.size("N"),
                               .T = 1,
                               .H = checks.size("H"),
                               .Hk = checks.size("H"),
                               .K = checks.size("K"),
                               .V = checks.size("V"),
                               .scale = t.scale,
                               .l2norm_qk = true,
                               .q = head_tensor(t.q),
                               .k = head_tensor(t.k),
                               .v = {},
                               .g = head_tensor(t.a),
                               .beta = head_tensor(t.b)},
                        .pool = state_pool(t.state, rows),
                        .o = nullptr},
          .gates = {.A_log = number_vector(t.A_log), .dt_bias = number_vector(t.dt_bias)},
          .gate = head_tensor(t.gate),
          .norm_weight = number_vector(t.norm_weight),
          .eps = t.eps,
          .y = nullptr};
}

Tensor jet_block_step(JetBlockStepTensors t) {
  Checks checks("jet_block_step");
  const std::vector<int64_t> rows = check(checks, t);
  t.state_indices = dense(t.state_indices);
  JetBlockStepParams p = params(checks, t, index_vector(t.state_indices));
  const int device = launch_device(t.q);
  if (const auto reason = plain_reason_of_call(device, jet_block_step_kernel_takes(p)))
    return call_plain<Tensor>("jet_plain::jet_block_step", *reason, t);
  t.A_log = dense(t.A_log), t.dt_bias = dense(t.dt_bias), t.norm_weight = dense(t.norm_weight);
  const Tensor y = allocate(t.q, {checks.size("N"), checks.size("D")});
  if (device == kHost) {
    t.weight = dense(t.weight), t.bias = dense(t.bias);
    p = params(checks, t, index_vector(rows));
    p.y = y.mutable_data_ptr();
    jet_block_step_cpu(p, torch_parallel());
  } else if constexpr (kWithCuda) {
    const GeneratorTensors generator = as_rows(t.generator());
    t.v = as_rows(t.v), t.hidden = generator.hidden, t.weight = generator.weight, t.bias = generator.bias;
    t.gate = head_rows(t.gate);
    const Tensor v = allocate(t.v, y.sizes()), o = allocate(t.v, t.gate.sizes(), ScalarType::Float);
    p = params(checks, t, index_vector(t.state_indices));
    p.conv.y = v.mutable_data_ptr(), p.recurrent.o = o.mutable_data_ptr(), p.y = y.mutable_data_ptr();
    p.recurrent.in.v = {.data = v.const_data_ptr(),
                        .dtype = p.recurrent.in.q.dtype,
                        .strides = {.b = checks.size("D"), .t = 0, .h = checks.size("V"), .d = 1}};
    jet_block_step_hopper(p, LaunchScope(t.q).stream());
  }
  return y;
}

}  // namespace
}  // namespace jet::bindings

JET_REGISTER(jet_block_step, jet::bindings::jet_block_step)
