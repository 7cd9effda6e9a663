// What the bindings of the gated delta rule's ops check and fill in alike.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "bindings/checks.h"
#include "csrc/gated_delta_rule/inputs.h"

namespace jet::bindings {

inline TokenStrides token_strides(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.dim() == 4 ? t.stride(3) : 0};
}

inline StateStrides state_strides(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// Dtype of the arithmetic, and of states outside a pool.
inline ScalarType real_dtype(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
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
inline void check_tokens(Checks& checks, const char* batch, const Tensor& q, const Tensor& k, const Tensor& v,
                         const Tensor& g, const Tensor& beta) {
  checks.shape("q", q, {batch, "T", "Hk", "K"});
  checks.floating("q", q);
  checks.shape("k", k, {batch, "T", "Hk", "K"});
  checks.shape("v", v, {batch, "T", "H", "V"});
  checks.shape("g", g, {batch, "T", "H"});
  checks.shape("beta", beta, {batch, "T", "H"});
  check_heads(checks, "v", "q");
  checks.dtype_like("k", k, "q", q);
  checks.dtype_like("v", v, "q", q);
  checks.floating("g", g);
  checks.floating("beta", beta);
  checks.device("k", k, "q", q);
  checks.device("v", v, "q", q);
  checks.device("g", g, "q", q);
  checks.device("beta", beta, "q", q);
  checks.decay("g", g);
}

// A state or its gradient, [N,H,K,V]
inline void check_state(Checks& checks, const char* name, const std::optional<Tensor>& t, const Tensor& q) {
  if (!t) return;
  checks.shape(name, *t, {"N", "H", "K", "V"});
  checks.dtype(name, *t, {real_dtype(q)});
  checks.device(name, *t, "q", q);
}

// A pool of states [P,H,K,V] that goes with tensors like `q`, and the row of each sequence.
inline std::vector<int64_t> check_pool(Checks& checks, const Tensor& state, const std::optional<Tensor>& state_indices,
                                       const char* like_name, const Tensor& like) {
  checks.shape("state", state, {"P", "H", "K", "V"});
  if (like.scalar_type() == ScalarType::Double)
    checks.dtype("state", state, {ScalarType::Double});
  else
    checks.dtype("state", state, {ScalarType::Float, ScalarType::BFloat16});
  checks.device("state", state, like_name, like);
  return checks.state_rows(state_indices, like_name, like);
}

// For a launch: the rows stay where they are.
inline StatePool device_pool(const Tensor& state, const std::optional<Tensor>& state_indices) {
  StatePool pool{kernel_dtype(state),  state.size(0), const_cast<void*>(state.const_data_ptr()),
                 state_strides(state), nullptr,       IndexType::i64};
  if (state_indices) pool.rows = state_indices->const_data_ptr(), pool.rows_dtype = index_type(*state_indices);
  return pool;
}

// For a call on the host: `rows` are what check_pool returned.
inline StatePool host_pool(const Tensor& state, const std::optional<Tensor>& state_indices,
                           const std::vector<int64_t>& rows) {
  StatePool pool = device_pool(state, std::nullopt);
  if (state_indices) pool.rows = rows.data();
  return pool;
}

}  // namespace jet::bindings
