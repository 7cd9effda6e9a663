// What the bindings of the recurrent gated delta rule, of its verify and of its commit take, check and fill in alike.
#pragma once

#include <initializer_list>
#include <tuple>
#include <vector>

#include "bindings/gated_delta_rule_inputs.h"
#include "csrc/gated_delta_rule/recurrent/kernel_takes.h"

namespace jet::bindings {

// A pool of states and the row of each sequence.
struct PoolArguments {
  Tensor state;
  OptionalTensor state_indices;

  auto tie() const { return std::tie(state, state_indices); }
};

// keys [N,T,Hk,K] and updates [N,T,H,V], which verify writes and commit reads.
struct Drafts {
  Tensor keys, updates;

  auto tie() const { return std::tie(keys, updates); }
};

// A pool [P,H,K,V] that goes with tensors like `like`. Returns the rows where the host may read them.
inline std::vector<int64_t> check_pool(Checks& checks, const PoolArguments& pool, const char* like_name,
                                       const Tensor& like) {
  checks.shape("state", pool.state, {"P", "H", "K", "V"});
  if (like.scalar_type() == ScalarType::Double)
    checks.dtype("state", pool.state, {ScalarType::Double});
  else
    checks.dtype("state", pool.state, {ScalarType::Float, ScalarType::BFloat16});
  checks.device("state", pool.state, like_name, like);
  return checks.state_rows(pool.state_indices, like_name, like);
}

inline StatePool state_pool(const Tensor& state, const IndexVector& rows) {
  return pool(state, state_strides(state), rows);
}

inline void check_drafts(Checks& checks, const Drafts& drafts, std::initializer_list<ScalarType> allowed) {
  checks.shape("keys", drafts.keys, {"N", "T", "Hk", "K"});
  checks.shape("updates", drafts.updates, {"N", "T", "H", "V"});
  checks.dtype("keys", drafts.keys, allowed);
  checks.dtype_like("updates", drafts.updates, "keys", drafts.keys);
  checks.contiguous("keys", drafts.keys);
  checks.contiguous("updates", drafts.updates);
}

}  // namespace jet::bindings
