// jet::recurrent_gated_delta_rule: checks, allocation, dispatch.
#include "csrc/gated_delta_rule/recurrent_gated_delta_rule.h"

#include <vector>

#include "bindings/backend.h"
#include "bindings/delta_rule_inputs.h"
#include "bindings/parallel.h"
#include "bindings/registration.h"

namespace jet::bindings {

namespace {

void check_pool(const Checks& checks, const Tensor& state, const Tensor& q) {
  if (q.scalar_type() == ScalarType::Double)
    checks.dtype("state", state, {ScalarType::Double});
  else
    checks.dtype("state", state, {ScalarType::Float, ScalarType::BFloat16});
  checks.device("state", state, "q", q);
  checks.not_expanded("state", state);
}

Tensor recurrent_gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state,
                                  std::optional<Tensor> state_indices, double scale, bool l2norm_qk) {
  Checks checks("recurrent_gated_delta_rule");
  check_tokens(checks, "N", q, k, v, g, beta);
  checks.shape("state", state, {"P", "H", "K", "V"});
  check_pool(checks, state, q);
  const std::vector<int64_t> rows = checks.state_rows(state_indices, "q", q);
  if (const auto reason = plain_reason(on_device(q)))
    return call_plain<Tensor>("jet_plain::recurrent_gated_delta_rule", *reason, q, k, v, g, beta, state,
                              state_indices, scale, l2norm_qk);
  g = torch::stable::to(g, real_dtype(q)), beta = torch::stable::to(beta, real_dtype(q));
  const Tensor o = torch::stable::new_empty(v, v.sizes());
  RecurrentGatedDeltaRuleParams p{};
  p.dtype = kernel_dtype(q), p.state_dtype = kernel_dtype(state);
  p.N = checks.size("N"), p.T = checks.size("T");
  p.H = checks.size("H"), p.Hk = checks.size("Hk"), p.K = checks.size("K"), p.V = checks.size("V");
  p.scale = scale, p.l2norm_qk = l2norm_qk;
  p.q = q.const_data_ptr(), p.q_strides = token_strides(q);
  p.k = k.const_data_ptr(), p.k_strides = token_strides(k);
  p.v = v.const_data_ptr(), p.v_strides = token_strides(v);
  p.g = g.const_data_ptr(), p.g_strides = token_strides(g);
  p.beta = beta.const_data_ptr(), p.beta_strides = token_strides(beta);
  p.state = state.mutable_data_ptr();
  p.state_strides = state_strides(state);
  p.rows = state_indices ? rows.data() : nullptr;
  p.o = o.mutable_data_ptr();
  recurrent_gated_delta_rule_cpu(p, torch_parallel());
  return o;
}

}  // namespace

JET_REGISTER(recurrent_gated_delta_rule, recurrent_gated_delta_rule)

}  // namespace jet::bindings
