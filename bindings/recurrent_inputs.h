// What the bindings of the recurrent gated delta rule, of its verify and of its commit check and fill in alike.
#pragma once

#include <initializer_list>

#include "bindings/gated_delta_rule_inputs.h"
#include "csrc/gated_delta_rule/recurrent/kernel_takes.h"

namespace jet::bindings {

// keys [N,T,Hk,K] and updates [N,T,H,V], which verify writes and commit reads.
inline void check_drafts(Checks& checks, const Tensor& keys, const Tensor& updates,
                         std::initializer_list<ScalarType> allowed) {
  checks.shape("keys", keys, {"N", "T", "Hk", "K"});
  checks.shape("updates", updates, {"N", "T", "H", "V"});
  checks.dtype("keys", keys, allowed);
  checks.dtype_like("updates", updates, "keys", keys);
  checks.contiguous("keys", keys);
  checks.contiguous("updates", updates);
}

// All but the pool and the outputs.
inline RecurrentGatedDeltaRuleParams recurrent_params(const Checks& checks, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& g, const Tensor& beta,
                                                      double scale, bool l2norm_qk) {
  RecurrentGatedDeltaRuleParams p{};
  p.dtype = kernel_dtype(q), p.g_dtype = kernel_dtype(g), p.beta_dtype = kernel_dtype(beta);
  p.N = checks.size("N"), p.T = checks.size("T");
  p.H = checks.size("H"), p.Hk = checks.size("Hk"), p.K = checks.size("K"), p.V = checks.size("V");
  p.scale = scale, p.l2norm_qk = l2norm_qk;
  p.q = q.const_data_ptr(), p.q_strides = token_strides(q);
  p.k = k.const_data_ptr(), p.k_strides = token_strides(k);
  p.v = v.const_data_ptr(), p.v_strides = token_strides(v);
  p.g = g.const_data_ptr(), p.g_strides = token_strides(g);
  p.beta = beta.const_data_ptr(), p.beta_strides = token_strides(beta);
  return p;
}

// On a CPU: g and beta in the arithmetic type, put into `p`. Lives as long as p is used.
class RealGates {
 public:
  RealGates(RecurrentGatedDeltaRuleParams& p, const Tensor& q, const Tensor& g, const Tensor& beta)
      : g_(in_dtype(g, real_dtype(q))), beta_(in_dtype(beta, real_dtype(q))) {
    p.g = g_.const_data_ptr(), p.g_strides = token_strides(g_), p.g_dtype = kernel_dtype(g_);
    p.beta = beta_.const_data_ptr(), p.beta_strides = token_strides(beta_), p.beta_dtype = kernel_dtype(beta_);
  }

 private:
  Tensor g_, beta_;
};

}  // namespace jet::bindings
