// jet::chunk_gated_delta_rule and jet::chunk_gated_delta_rule_backward.
#include "csrc/gated_delta_rule/chunk_gated_delta_rule.h"

#include <vector>

#include "bindings/checks.h"
#include "bindings/parallel.h"
#include "bindings/registration.h"

namespace jet::bindings {

namespace {

TokenStrides token_strides(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.dim() == 4 ? t.stride(3) : 0};
}

StateStrides state_strides(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

PlainReason plain_reason(const Tensor&) { return PlainReason::no_kernel_yet; }

// The checked arguments that forward and backward share, and what keeps the memory behind `params` alive.
class Arguments {
 public:
  Arguments(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
            const std::optional<Tensor>& initial_state, const std::optional<Tensor>& cu_seqlens)
      : checks(op), real(q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float) {
    checks.floating("q", q);
    checks.shape("q", q, {"B", "T", "Hk", "K"});
    checks.shape("k", k, {"B", "T", "Hk", "K"});
    checks.shape("v", v, {"B", "T", "H", "V"});
    checks.shape("g", g, {"B", "T", "H"});
    checks.shape("beta", beta, {"B", "T", "H"});
    const int64_t H = checks.size("H"), Hk = checks.size("Hk");
    if (Hk == 0 ? H != 0 : H % Hk != 0) checks.fail("v dimension 2 (H) must be a multiple of Hk = ", Hk, " (as in q), got ", H);
    if (checks.size("K") < 1) checks.fail("q dimension 3 (K) must be at least 1, got 0");
    if (checks.size("V") < 1) checks.fail("v dimension 3 (V) must be at least 1, got 0");
    same("k", k, q);
    same("v", v, q);
    gate("g", g, q);
    gate("beta", beta, q);
    offsets = checks.sequences(cu_seqlens, "q", q);
    if (initial_state) state("initial_state", *initial_state, q);
  }

  // [B, T, ...] tensor in the dtype and on the device of q
  void same(const char* name, const Tensor& t, const Tensor& q) const {
    checks.dtype_like(name, t, "q", q);
    checks.device(name, t, "q", q);
  }

  void state(const char* name, const Tensor& t, const Tensor& q) {
    checks.shape(name, t, {"N", "H", "K", "V"});
    checks.dtype(name, t, {real});
    checks.device(name, t, "q", q);
  }

  ChunkGatedDeltaRuleParams params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
                                   const std::optional<Tensor>& initial_state, double scale, bool l2norm_qk) {
    ChunkGatedDeltaRuleParams p{};
    p.dtype = kernel_dtype(q);
    p.B = checks.size("B"), p.T = checks.size("T"), p.N = checks.size("N");
    p.H = checks.size("H"), p.Hk = checks.size("Hk"), p.K = checks.size("K"), p.V = checks.size("V");
    p.scale = scale, p.l2norm_qk = l2norm_qk;
    real_g = torch::stable::to(g, real), real_beta = torch::stable::to(beta, real);
    p.q = q.const_data_ptr(), p.q_strides = token_strides(q);
    p.k = k.const_data_ptr(), p.k_strides = token_strides(k);
    p.v = v.const_data_ptr(), p.v_strides = token_strides(v);
    p.g = real_g.const_data_ptr(), p.g_strides = token_strides(real_g);
    p.beta = real_beta.const_data_ptr(), p.beta_strides = token_strides(real_beta);
    if (initial_state) p.initial_state = initial_state->const_data_ptr(), p.initial_state_strides = state_strides(*initial_state);
    p.cu_seqlens = offsets.empty() ? nullptr : offsets.data();
    return p;
  }

  Tensor new_state(const Tensor& q) const {
    return torch::stable::new_empty(q, {checks.size("N"), checks.size("H"), checks.size("K"), checks.size("V")}, real);
  }

  Checks checks;
  ScalarType real;  // dtype of states and of all arithmetic
  std::vector<int64_t> offsets;

 private:
  void gate(const char* name, const Tensor& t, const Tensor& q) const {
    checks.floating(name, t);
    checks.device(name, t, "q", q);
  }

  Tensor real_g, real_beta;
};

std::tuple<Tensor, Tensor> chunk_gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta,
                                                  std::optional<Tensor> initial_state, std::optional<Tensor> cu_seqlens,
                                                  double scale, bool l2norm_qk) {
  Arguments arguments("chunk_gated_delta_rule", q, k, v, g, beta, initial_state, cu_seqlens);
  if (!q.is_cpu())
    return call_plain<std::tuple<Tensor, Tensor>>("jet_plain::chunk_gated_delta_rule", plain_reason(q), q, k, v, g, beta,
                                                  initial_state, cu_seqlens, scale, l2norm_qk);
  const Tensor o = torch::stable::new_empty(v, v.sizes(), v.scalar_type());
  const Tensor final_state = arguments.new_state(q);
  ChunkGatedDeltaRuleParams p = arguments.params(q, k, v, g, beta, initial_state, scale, l2norm_qk);
  p.o = o.mutable_data_ptr();
  p.final_state = final_state.mutable_data_ptr();
  chunk_gated_delta_rule_cpu(p, torch_parallel());
  return {o, final_state};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients chunk_gated_delta_rule_backward(Tensor grad_o, std::optional<Tensor> grad_final_state, Tensor q, Tensor k, Tensor v,
                                          Tensor g, Tensor beta, std::optional<Tensor> initial_state,
                                          std::optional<Tensor> cu_seqlens, double scale, bool l2norm_qk) {
  Arguments arguments("chunk_gated_delta_rule_backward", q, k, v, g, beta, initial_state, cu_seqlens);
  arguments.checks.shape("grad_o", grad_o, {"B", "T", "H", "V"});
  arguments.same("grad_o", grad_o, q);
  if (grad_final_state) arguments.state("grad_final_state", *grad_final_state, q);
  if (!q.is_cpu())
    return call_plain<Gradients>("jet_plain::chunk_gated_delta_rule_backward", plain_reason(q), grad_o, grad_final_state, q, k,
                                 v, g, beta, initial_state, cu_seqlens, scale, l2norm_qk);
  const auto like = [](const Tensor& t, ScalarType type) { return torch::stable::new_empty(t, t.sizes(), type); };
  const Tensor dq = like(q, q.scalar_type()), dk = like(k, k.scalar_type()), dv = like(v, v.scalar_type());
  const Tensor dg = like(g, arguments.real), dbeta = like(beta, arguments.real);
  const Tensor dinitial_state = arguments.new_state(q);
  ChunkGatedDeltaRuleBackwardParams p{};
  p.forward = arguments.params(q, k, v, g, beta, initial_state, scale, l2norm_qk);
  p.grad_o = grad_o.const_data_ptr(), p.grad_o_strides = token_strides(grad_o);
  if (grad_final_state)
    p.grad_final_state = grad_final_state->const_data_ptr(), p.grad_final_state_strides = state_strides(*grad_final_state);
  p.dq = dq.mutable_data_ptr(), p.dk = dk.mutable_data_ptr(), p.dv = dv.mutable_data_ptr();
  p.dg = dg.mutable_data_ptr(), p.dbeta = dbeta.mutable_data_ptr(), p.dinitial_state = dinitial_state.mutable_data_ptr();
  chunk_gated_delta_rule_backward_cpu(p, torch_parallel());
  return {dq, dk, dv, torch::stable::to(dg, g.scalar_type()), torch::stable::to(dbeta, beta.scalar_type()), dinitial_state};
}

}  // namespace

JET_REGISTER(chunk_gated_delta_rule, chunk_gated_delta_rule)
JET_REGISTER(chunk_gated_delta_rule_backward, chunk_gated_delta_rule_backward)

}  // namespace jet::bindings
