// jet::recurrent_gated_delta_rule.
#include "csrc/gated_delta_rule/recurrent_gated_delta_rule.h"

#include <vector>

#include "bindings/checks.h"
#include "bindings/parallel.h"
#include "bindings/registration.h"

namespace jet::bindings {

namespace {

TokenStrides token_strides(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.dim() == 4 ? t.stride(3) : 0};
}

PlainReason plain_reason(const Tensor&) { return PlainReason::no_kernel_yet; }

void check_pool(const Checks& checks, const Tensor& state, const Tensor& q) {
  if (q.scalar_type() == ScalarType::Double)
    checks.dtype("state", state, {ScalarType::Double});
  else
    checks.dtype("state", state, {ScalarType::Float, ScalarType::BFloat16});
  checks.device("state", state, "q", q);
  for (int64_t i = 0; i < state.dim(); ++i)
    if (state.size(i) > 1 && state.stride(i) == 0)
      checks.fail("state dimension ", i, " must not be expanded (it is written in place), got stride 0");
}

Tensor recurrent_gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state,
                                  std::optional<Tensor> state_indices, double scale, bool l2norm_qk) {
  Checks checks("recurrent_gated_delta_rule");
  checks.floating("q", q);
  checks.shape("q", q, {"N", "T", "Hk", "K"});
  checks.shape("k", k, {"N", "T", "Hk", "K"});
  checks.shape("v", v, {"N", "T", "H", "V"});
  checks.shape("g", g, {"N", "T", "H"});
  checks.shape("beta", beta, {"N", "T", "H"});
  checks.shape("state", state, {"P", "H", "K", "V"});
  const int64_t H = checks.size("H"), Hk = checks.size("Hk"), K = checks.size("K"), V = checks.size("V");
  if (Hk == 0 ? H != 0 : H % Hk != 0) checks.fail("v dimension 2 (H) must be a multiple of Hk = ", Hk, " (as in q), got ", H);
  if (K < 1) checks.fail("q dimension 3 (K) must be at least 1, got 0");
  if (V < 1) checks.fail("v dimension 3 (V) must be at least 1, got 0");
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    checks.dtype_like(name, t, "q", q);
    checks.device(name, t, "q", q);
  }
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"g", g}, {"beta", beta}}) {
    checks.floating(name, t);
    checks.device(name, t, "q", q);
  }
  check_pool(checks, state, q);
  const std::vector<int64_t> rows = checks.state_rows(state_indices, "q", q);
  if (!q.is_cpu())
    return call_plain<Tensor>("jet_plain::recurrent_gated_delta_rule", plain_reason(q), q, k, v, g, beta, state, state_indices,
                              scale, l2norm_qk);

  const ScalarType real = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Tensor real_g = torch::stable::to(g, real), real_beta = torch::stable::to(beta, real);
  const Tensor o = torch::stable::new_empty(v, v.sizes(), v.scalar_type());
  RecurrentGatedDeltaRuleParams p{};
  p.dtype = kernel_dtype(q), p.state_dtype = kernel_dtype(state);
  p.N = checks.size("N"), p.T = checks.size("T"), p.H = H, p.Hk = Hk, p.K = K, p.V = V;
  p.scale = scale, p.l2norm_qk = l2norm_qk;
  p.q = q.const_data_ptr(), p.q_strides = token_strides(q);
  p.k = k.const_data_ptr(), p.k_strides = token_strides(k);
  p.v = v.const_data_ptr(), p.v_strides = token_strides(v);
  p.g = real_g.const_data_ptr(), p.g_strides = token_strides(real_g);
  p.beta = real_beta.const_data_ptr(), p.beta_strides = token_strides(real_beta);
  p.state = state.mutable_data_ptr();
  p.state_strides = {state.stride(0), state.stride(1), state.stride(2), state.stride(3)};
  p.rows = state_indices ? rows.data() : nullptr;
  p.o = o.mutable_data_ptr();
  recurrent_gated_delta_rule_cpu(p, torch_parallel());
  return o;
}

}  // namespace

JET_REGISTER(recurrent_gated_delta_rule, recurrent_gated_delta_rule)

}  // namespace jet::bindings
