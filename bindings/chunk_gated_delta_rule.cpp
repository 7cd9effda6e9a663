// jet::chunk_gated_delta_rule and jet::chunk_gated_delta_rule_backward: checks, allocation, dispatch.
#include "csrc/gated_delta_rule/chunk/chunk_gated_delta_rule.h"

#include <tuple>
#include <vector>

#include "bindings/backend.h"
#include "bindings/gated_delta_rule_inputs.h"
#include "bindings/launch_scope.h"
#include "bindings/registration.h"
#include "bindings/torch_parallel.h"

namespace jet::bindings {

namespace {

struct ChunkArguments {
  Tokens tokens;
  OptionalTensor initial_state, cu_seqlens;
  Scaling scaling;

  auto tie() const { return std::tuple_cat(tokens.tie(), std::tie(initial_state, cu_seqlens), scaling.tie()); }
};

// Returns the offsets of the sequences where the host may read them.
std::vector<int64_t> check(Checks& checks, const ChunkArguments& x) {
  check_tokens(checks, "B", x.tokens);
  std::vector<int64_t> offsets = checks.sequences(x.cu_seqlens, "q", x.tokens.q);
  check_state(checks, "initial_state", x.initial_state, x.tokens.q);
  return offsets;
}

// All but the outputs. On a CPU cu_seqlens are the values that the checks have read.
ChunkGatedDeltaRuleParams params(const Checks& checks, const ChunkArguments& x, const IndexVector& cu_seqlens) {
  return {.in = inputs(x.tokens, x.scaling),
          .N = checks.size("N"),
          .initial_state = state_tensor(x.initial_state),
          .cu_seqlens = cu_seqlens,
          .o = nullptr,
          .final_state = nullptr};
}

Tensor new_state(const Checks& checks, const Tensor& q) {
  return allocate(q, {checks.size("N"), checks.size("H"), checks.size("K"), checks.size("V")}, real_dtype(q));
}

// On the device; `p` holds sizes, gates and outputs.
void launch(ChunkGatedDeltaRuleParams p, const ChunkArguments& x) {
  const Tensor q = readable(x.tokens.q), k = readable(x.tokens.k), v = readable(x.tokens.v);
  const OptionalTensor cu_seqlens = dense(x.cu_seqlens);
  p.in.q = token_tensor(q), p.in.k = token_tensor(k), p.in.v = token_tensor(v);
  p.cu_seqlens = index_vector(cu_seqlens);
  if constexpr (kWithCuda) {
    const LaunchScope scope(q);
    const Tensor workspace = allocate(q, {chunk_gated_delta_rule_workspace(p)}, ScalarType::Byte);
    chunk_gated_delta_rule_hopper(p, workspace.mutable_data_ptr(), scope.stream());
  }
}

std::tuple<Tensor, Tensor> chunk_gated_delta_rule(ChunkArguments x) {
  Checks checks("chunk_gated_delta_rule");
  const std::vector<int64_t> offsets = check(checks, x);
  ChunkGatedDeltaRuleParams p = params(checks, x, index_vector(offsets));
  const Tensor &q = x.tokens.q, &v = x.tokens.v;
  const int device = launch_device(q);
  if (const auto reason = plain_reason_of_call(device, chunk_kernel_takes(p)))
    return call_plain<std::tuple<Tensor, Tensor>>("jet_plain::chunk_gated_delta_rule", *reason, x);
  make_gates_real(x.tokens, p.in);
  const Tensor o = allocate(v, v.sizes()), final_state = new_state(checks, q);
  p.o = o.mutable_data_ptr();
  p.final_state = final_state.mutable_data_ptr();
  if (device != kHost)
    launch(p, x);
  else
    chunk_gated_delta_rule_cpu(p, torch_parallel());
  return {o, final_state};
}

// The backward on the device; `p` holds sizes, gates and gradients of the inputs.
void launch(ChunkGatedDeltaRuleBackwardParams p, const ChunkArguments& x, const Tensor& gradient) {
  const Tensor q = readable(x.tokens.q), k = readable(x.tokens.k), v = readable(x.tokens.v),
               grad_o = readable(gradient);
  const OptionalTensor cu_seqlens = dense(x.cu_seqlens);
  GatedDeltaRuleInputs& in = p.forward.in;
  in.q = token_tensor(q), in.k = token_tensor(k), in.v = token_tensor(v), p.grad_o = token_tensor(grad_o);
  p.forward.cu_seqlens = index_vector(cu_seqlens);
  if constexpr (kWithCuda) {
    const LaunchScope scope(q);
    const Tensor workspace = allocate(q, {chunk_gated_delta_rule_backward_workspace(p)}, ScalarType::Byte);
    chunk_gated_delta_rule_backward_hopper(p, workspace.mutable_data_ptr(), scope.stream());
  }
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients chunk_gated_delta_rule_backward(Tensor grad_o, OptionalTensor grad_final_state, ChunkArguments x) {
  Checks checks("chunk_gated_delta_rule_backward");
  const std::vector<int64_t> offsets = check(checks, x);
  const Tokens& tokens = x.tokens;
  checks.shape("grad_o", grad_o, {"B", "T", "H", "V"});
  checks.dtype_like("grad_o", grad_o, "q", tokens.q);
  checks.device("grad_o", grad_o, "q", tokens.q);
  check_state(checks, "grad_final_state", grad_final_state, tokens.q);
  ChunkGatedDeltaRuleParams forward = params(checks, x, index_vector(offsets));
  const int device = launch_device(tokens.q);
  if (const auto reason = plain_reason_of_call(device, chunk_kernel_takes(forward)))
    return call_plain<Gradients>("jet_plain::chunk_gated_delta_rule_backward", *reason, grad_o, grad_final_state, x);
  const ScalarType g_dtype = tokens.g.scalar_type(), beta_dtype = tokens.beta.scalar_type();
  make_gates_real(x.tokens, forward.in);
  const auto like = [](const Tensor& t) { return allocate(t, t.sizes()); };
  const Tensor dq = like(tokens.q), dk = like(tokens.k), dv = like(tokens.v);
  const Tensor dg = like(tokens.g), dbeta = like(tokens.beta), dinitial_state = new_state(checks, tokens.q);
  const ChunkGatedDeltaRuleBackwardParams p{.forward = forward,
                                            .grad_o = token_tensor(grad_o),
                                            .grad_final_state = state_tensor(grad_final_state),
                                            .dq = dq.mutable_data_ptr(),
                                            .dk = dk.mutable_data_ptr(),
                                            .dv = dv.mutable_data_ptr(),
                                            .dg = dg.mutable_data_ptr(),
                                            .dbeta = dbeta.mutable_data_ptr(),
                                            .dinitial_state = dinitial_state.mutable_data_ptr()};
  if (device != kHost)
    launch(p, x, grad_o);
  else
    chunk_gated_delta_rule_backward_cpu(p, torch_parallel());
  return {dq, dk, dv, in_dtype(dg, g_dtype), in_dtype(dbeta, beta_dtype), dinitial_state};
}

}  // namespace

JET_REGISTER(chunk_gated_delta_rule, chunk_gated_delta_rule)
JET_REGISTER(chunk_gated_delta_rule_backward, chunk_gated_delta_rule_backward)

}  // namespace jet::bindings
