// What the bindings of the gated delta rule's ops check and fill in alike.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "bindings/checks.h"
#include "csrc/gated_delta_rule/layout.h"

namespace jet::bindings {

inline TokenStrides token_strides(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.dim() == 4 ? t.stride(3) : 0};
}

inline StateStrides state_strides(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// Dtype of the arithmetic, and of states outside a pool.
inline ScalarType real_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// q, k [batch,T,Hk,K], v [batch,T,H,V], g, beta [batch,T,H]; `batch` is the symbol B or N
inline void check_tokens(Checks& checks, const char* batch, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                         const Tensor& beta) {
  checks.floating("q", q);
  checks.shape("q", q, {batch, "T", "Hk", "K"});
  checks.shape("k", k, {batch, "T", "Hk", "K"});
  checks.shape("v", v, {batch, "T", "H", "V"});
  checks.shape("g", g, {batch, "T", "H"});
  checks.shape("beta", beta, {batch, "T", "H"});
  const int64_t H = checks.size("H"), Hk = checks.size("Hk");
  if (Hk == 0 ? H != 0 : H % Hk != 0) checks.fail("v dimension 2 (H) must be a multiple of Hk = ", Hk, " (as in q), got ", H);
  if (checks.size("K") < 1) checks.fail("q dimension 3 (K) must be at least 1, got 0");
  if (checks.size("V") < 1) checks.fail("v dimension 3 (V) must be at least 1, got 0");
  checks.dtype_like("k", k, "q", q);
  checks.dtype_like("v", v, "q", q);
  checks.floating("g", g);
  checks.floating("beta", beta);
  checks.device("k", k, "q", q);
  checks.device("v", v, "q", q);
  checks.device("g", g, "q", q);
  checks.device("beta", beta, "q", q);
}

// A state or its gradient, [N,H,K,V]
inline void check_state(Checks& checks, const char* name, const std::optional<Tensor>& t, const Tensor& q) {
  if (!t) return;
  checks.shape(name, *t, {"N", "H", "K", "V"});
  checks.dtype(name, *t, {real_dtype(q)});
  checks.device(name, *t, "q", q);
}

}  // namespace jet::bindings
