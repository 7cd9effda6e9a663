// Which calls the Hopper kernel of the recurrent ops takes; the others are served by the plain path.
#pragma once

#include "csrc/gated_delta_rule/head_dims.h"
#include "csrc/gated_delta_rule/recurrent/recurrent_gated_delta_rule_commit.h"
#include "csrc/gated_delta_rule/recurrent/recurrent_gated_delta_rule_verify.h"

namespace jet {

constexpr int64_t kRecurrentMaxV = 1024;  // columns whose v, for a few tokens, is kept in shared memory

// States [K, V] or, as other engines have them, [V, K], in accesses of 16 bytes.
enum class StateOrder { k_first, v_first, other };

inline StateOrder state_order(const StatePool& pool) {
  const int64_t unit = pool.dtype == Dtype::f32 ? 4 : 8;
  const StateStrides& s = pool.strides;
  if (reinterpret_cast<uintptr_t>(pool.data) % 16 != 0 || s.h % unit != 0 || s.n % unit != 0) return StateOrder::other;
  if (s.v == 1 && s.k % unit == 0) return StateOrder::k_first;
  return s.k == 1 && s.v % unit == 0 ? StateOrder::v_first : StateOrder::other;
}

inline bool recurrent_kernel_takes(int64_t K, int64_t V, const StatePool& pool) {
  const bool shape = HopperHeadDims::has(K) && V % 16 == 0 && V <= kRecurrentMaxV;
  return shape && state_order(pool) != StateOrder::other && pool.dtype != Dtype::f64;
}

inline bool recurrent_kernel_takes(const RecurrentGatedDeltaRuleParams& p) {
  const GatedDeltaRuleInputs& in = p.in;
  return recurrent_kernel_takes(in.K, in.V, p.pool) && in.q.dtype != Dtype::f64 && in.g.dtype != Dtype::f64 &&
         in.beta.dtype != Dtype::f64;
}
inline bool recurrent_kernel_takes(const RecurrentGatedDeltaRuleVerifyParams& p) {
  return recurrent_kernel_takes(p.forward);
}
inline bool recurrent_kernel_takes(const RecurrentGatedDeltaRuleCommitParams& p) {
  return recurrent_kernel_takes(p.K, p.V, p.pool) && p.g.dtype != Dtype::f64;
}

}  // namespace jet
