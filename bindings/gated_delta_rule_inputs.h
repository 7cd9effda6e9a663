// What the bindings of the gated delta rule's ops take, check and fill in alike.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "csrc/gated_delta_rule/chunk/kernel_takes.h"
#include "csrc/gated_delta_rule/inputs.h"

namespace jet::bindings {

// The first arguments of an op, in the order of its schema (registration.h).
struct Tokens {
  Tensor q, k, v, g, beta;

  auto tie() const { return std::tie(q, k, v, g, beta); }
  std::array<Checks::Named, 5> named() const { return {{{"q", q}, {"k", k}, {"v", v}, {"g", g}, {"beta", beta}}}; }
};

// The last ones.
struct Scaling {
  double scale;
  bool l2norm_qk;

  auto tie() const { return std::tie(scale, l2norm_qk); }
};

// g or beta [B,T,H]
inline TokenTensor gate_tensor(const Tensor& t) {
  return {.data = t.const_data_ptr(),
          .dtype = kernel_dtype(t),
          .strides = {.b = t.stride(0), .t = t.stride(1), .h = t.stride(2), .d = 0}};
}

inline StateStrides state_strides(const Tensor& t) {
  return {.n = t.stride(0), .h = t.stride(1), .k = t.stride(2), .v = t.stride(3)};
}

inline StateTensor state_tensor(const OptionalTensor& t) {
  return t ? StateTensor{.data = t->const_data_ptr(), .strides = state_strides(*t)} : StateTensor{};
}

inline GatedDeltaRuleInputs inputs(const Tokens& x, const Scaling& scaling) {
  return {.B = x.q.size(0),
          .T = x.q.size(1),
          .H = x.v.size(2),
          .Hk = x.q.size(2),
          .K = x.q.size(3),
          .V = x.v.size(3),
          .scale = scaling.scale,
          .l2norm_qk = scaling.l2norm_qk,
          .q = token_tensor(x.q),
          .k = token_tensor(x.k),
          .v = token_tensor(x.v),
          .g = gate_tensor(x.g),
          .beta = gate_tensor(x.beta)};
}

// Dtype of the arithmetic, and of states outside a pool.
inline ScalarType real_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Puts g and beta in the arithmetic type into `in`, which points into `x`.
inline void make_gates_real(Tokens& x, GatedDeltaRuleInputs& in) {
  x.g = in_dtype(x.g, real_dtype(x.q)), x.beta = in_dtype(x.beta, real_dtype(x.q));
  in.g = gate_tensor(x.g), in.beta = gate_tensor(x.beta);
}

// q, k or v itself where the kernels of the chunked rule can read it, else a contiguous copy.
inline Tensor readable(const Tensor& t) {
  if (chunk_kernel_reads(token_tensor(t), t.size(0), t.size(1), t.size(2))) return t;
  Tensor copy = allocate(t, t.sizes());
  return torch::stable::copy_(copy, t);
}

// The heads and head dims of `values` [..,H,V] and `keys` [..,Hk,K], whose shapes have been checked.
inline void check_heads(const Checks& checks, const char* values, const char* keys) {
  const int64_t H = checks.size("H"), Hk = checks.size("Hk");
  if (Hk == 0 ? H != 0 : H % Hk != 0)
    checks.fail(values, " dimension 2 (H) must be a multiple of Hk = ", Hk, " (as in ", keys, "), got ", H);
  if (checks.size("K") < 1) checks.fail(keys, " dimension 3 (K) must be at least 1, got 0");
  if (checks.size("V") < 1) checks.fail(values, " dimension 3 (V) must be at least 1, got 0");
}

// q, k [batch,T,Hk,K], v [batch,T,H,V], g, beta [batch,T,H]; `batch` is the symbol B or N
inline void check_tokens(Checks& checks, const char* batch, const Tokens& x) {
  checks.shape("q", x.q, {batch, "T", "Hk", "K"});
  checks.floating("q", x.q);
  checks.shape("k", x.k, {batch, "T", "Hk", "K"});
  checks.shape("v", x.v, {batch, "T", "H", "V"});
  checks.shape("g", x.g, {batch, "T", "H"});
  checks.shape("beta", x.beta, {batch, "T", "H"});
  check_heads(checks, "v", "q");
  checks.dtype_like("k", x.k, "q", x.q);
  checks.dtype_like("v", x.v, "q", x.q);
  checks.floating("g", x.g);
  checks.floating("beta", x.beta);
  checks.device("k", x.k, "q", x.q);
  checks.device("v", x.v, "q", x.q);
  checks.device("g", x.g, "q", x.q);
  checks.device("beta", x.beta, "q", x.q);
  checks.decay("g", x.g);
}

// A state or its gradient, [N,H,K,V]
inline void check_state(Checks& checks, const char* name, const OptionalTensor& t, const Tensor& q) {
  if (!t) return;
  checks.shape(name, *t, {"N", "H", "K", "V"});
  checks.dtype(name, *t, {real_dtype(q)});
  checks.device(name, *t, "q", q);
}

}  // namespace jet::bindings
