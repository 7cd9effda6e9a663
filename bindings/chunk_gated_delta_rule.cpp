// jet::chunk_gated_delta_rule and jet::chunk_gated_delta_rule_backward: checks, allocation, dispatch.
#include "csrc/gated_delta_rule/chunk/chunk_gated_delta_rule.h"

#include <tuple>
#include <vector>

#include "bindings/backend.h"
#include "bindings/gated_delta_rule_inputs.h"
#include "bindings/launch.h"
#include "bindings/parallel.h"
#include "bindings/registration.h"
#include "csrc/gated_delta_rule/chunk/kernel_takes.h"

namespace jet::bindings {

namespace {

using OptionalTensor = std::optional<Tensor>;

// Returns the offsets of the sequences where the host may read them.
std::vector<int64_t> check(Checks& checks, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                           const Tensor& beta, const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens) {
  check_tokens(checks, "B", q, k, v, g, beta);
  std::vector<int64_t> offsets = checks.sequences(cu_seqlens, "q", q);
  check_state(checks, "initial_state", initial_state, q);
  return offsets;
}

// All but the outputs. g and beta are in real_dtype(q).
ChunkGatedDeltaRuleParams params(const Checks& checks, const Tensor& q, const Tensor& k, const Tensor& v,
                                 const Tensor& g, const Tensor& beta, const OptionalTensor& initial_state,
                                 const std::vector<int64_t>& offsets, double scale, bool l2norm_qk) {
  ChunkGatedDeltaRuleParams p{};
  p.dtype = kernel_dtype(q);
  p.B = checks.size("B"), p.T = checks.size("T"), p.N = checks.size("N");
  p.H = checks.size("H"), p.Hk = checks.size("Hk"), p.K = checks.size("K"), p.V = checks.size("V");
  p.scale = scale, p.l2norm_qk = l2norm_qk;
  p.q = q.const_data_ptr(), p.q_strides = token_strides(q);
  p.k = k.const_data_ptr(), p.k_strides = token_strides(k);
  p.v = v.const_data_ptr(), p.v_strides = token_strides(v);
  p.g = g.const_data_ptr(), p.g_strides = token_strides(g);
  p.beta = beta.const_data_ptr(), p.beta_strides = token_strides(beta);
  if (initial_state)
    p.initial_state = initial_state->const_data_ptr(), p.initial_state_strides = state_strides(*initial_state);
  p.cu_seqlens = offsets.empty() ? nullptr : offsets.data();
  return p;
}

Tensor new_state(const Checks& checks, const Tensor& q) {
  return allocate(q, {checks.size("N"), checks.size("H"), checks.size("K"), checks.size("V")}, real_dtype(q));
}

// `t` itself where the kernels can read it, else a contiguous copy.
Tensor readable(const Tensor& t) {
  if (chunk_kernel_reads(t.const_data_ptr(), token_strides(t), t.size(0), t.size(1), t.size(2))) return t;
  Tensor copy = allocate(t, t.sizes());
  return torch::stable::copy_(copy, t);
}

// On the device; `p` holds sizes and outputs.
void launch(ChunkGatedDeltaRuleParams p, const Tensor& q, const Tensor& k, const Tensor& v,
            const OptionalTensor& cu_seqlens) {
  const Tensor readable_q = readable(q), readable_k = readable(k), readable_v = readable(v);
  p.q = readable_q.const_data_ptr(), p.q_strides = token_strides(readable_q);
  p.k = readable_k.const_data_ptr(), p.k_strides = token_strides(readable_k);
  p.v = readable_v.const_data_ptr(), p.v_strides = token_strides(readable_v);
  std::optional<Tensor> offsets;
  if (cu_seqlens) offsets = dense(*cu_seqlens);
  if constexpr (kWithCuda) {
    const LaunchScope scope(q);
    const Tensor workspace = allocate(q, {chunk_gated_delta_rule_workspace(p, offsets.has_value())}, ScalarType::Byte);
    ChunkGatedDeltaRuleLaunch call{p, {nullptr, IndexType::i64}, workspace.mutable_data_ptr()};
    if (offsets) call.cu_seqlens = {offsets->const_data_ptr(), index_type(*offsets)};
    chunk_gated_delta_rule_hopper(call, scope.stream());
  }
}

std::tuple<Tensor, Tensor> chunk_gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta,
                                                  OptionalTensor initial_state, OptionalTensor cu_seqlens, double scale,
                                                  bool l2norm_qk) {
  Checks checks("chunk_gated_delta_rule");
  const std::vector<int64_t> offsets = check(checks, q, k, v, g, beta, initial_state, cu_seqlens);
  ChunkGatedDeltaRuleParams p = params(checks, q, k, v, g, beta, initial_state, offsets, scale, l2norm_qk);
  const int device = launch_device(q);
  if (const auto reason = plain_reason_of_call(device, chunk_kernel_takes(p)))
    return call_plain<std::tuple<Tensor, Tensor>>("jet_plain::chunk_gated_delta_rule", *reason, q, k, v, g, beta,
                                                  initial_state, cu_seqlens, scale, l2norm_qk);
  g = in_dtype(g, real_dtype(q)), beta = in_dtype(beta, real_dtype(q));
  p.g = g.const_data_ptr(), p.g_strides = token_strides(g);
  p.beta = beta.const_data_ptr(), p.beta_strides = token_strides(beta);
  const Tensor o = allocate(v, v.sizes()), final_state = new_state(checks, q);
  p.o = o.mutable_data_ptr();
  p.final_state = final_state.mutable_data_ptr();
  if (device != kHost) {
    launch(p, q, k, v, cu_seqlens);
    return {o, final_state};
  }
  chunk_gated_delta_rule_cpu(p, torch_parallel());
  return {o, final_state};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients chunk_gated_delta_rule_backward(Tensor grad_o, OptionalTensor grad_final_state, Tensor q, Tensor k, Tensor v,
                                          Tensor g, Tensor beta, OptionalTensor initial_state,
                                          OptionalTensor cu_seqlens, double scale, bool l2norm_qk) {
  Checks checks("chunk_gated_delta_rule_backward");
  const std::vector<int64_t> offsets = check(checks, q, k, v, g, beta, initial_state, cu_seqlens);
  checks.shape("grad_o", grad_o, {"B", "T", "H", "V"});
  checks.dtype_like("grad_o", grad_o, "q", q);
  checks.device("grad_o", grad_o, "q", q);
  check_state(checks, "grad_final_state", grad_final_state, q);
  if (const auto reason = plain_reason(launch_device(q), false))
    return call_plain<Gradients>("jet_plain::chunk_gated_delta_rule_backward", *reason, grad_o, grad_final_state, q, k,
                                 v, g, beta, initial_state, cu_seqlens, scale, l2norm_qk);
  const ScalarType g_dtype = g.scalar_type(), beta_dtype = beta.scalar_type();
  g = in_dtype(g, real_dtype(q)), beta = in_dtype(beta, real_dtype(q));
  const auto like = [](const Tensor& t) { return allocate(t, t.sizes()); };
  const Tensor dq = like(q), dk = like(k), dv = like(v), dg = like(g), dbeta = like(beta);
  const Tensor dinitial_state = new_state(checks, q);
  ChunkGatedDeltaRuleBackwardParams p{};
  p.forward = params(checks, q, k, v, g, beta, initial_state, offsets, scale, l2norm_qk);
  p.grad_o = grad_o.const_data_ptr(), p.grad_o_strides = token_strides(grad_o);
  if (grad_final_state)
    p.grad_final_state = grad_final_state->const_data_ptr(),
    p.grad_final_state_strides = state_strides(*grad_final_state);
  p.dq = dq.mutable_data_ptr(), p.dk = dk.mutable_data_ptr(), p.dv = dv.mutable_data_ptr();
  p.dg = dg.mutable_data_ptr(), p.dbeta = dbeta.mutable_data_ptr(),
  p.dinitial_state = dinitial_state.mutable_data_ptr();
  chunk_gated_delta_rule_backward_cpu(p, torch_parallel());
  return {dq, dk, dv, in_dtype(dg, g_dtype), in_dtype(dbeta, beta_dtype), dinitial_state};
}

const HasHopperKernel has_kernel("chunk_gated_delta_rule");

}  // namespace

JET_REGISTER(chunk_gated_delta_rule, chunk_gated_delta_rule)
JET_REGISTER(chunk_gated_delta_rule_backward, chunk_gated_delta_rule_backward)

}  // namespace jet::bindings
