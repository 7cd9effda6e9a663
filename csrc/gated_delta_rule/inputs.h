// What the ops of the gated delta rule have in common: their inputs, their states, the l2norm.
#pragma once

#include <cstdint>

#include "csrc/common/tensors.h"

namespace jet {

constexpr double kL2NormEps = 1e-6;  // x / sqrt(sum x^2 + kL2NormEps)

// Element strides of states [N, H, K, V], or of a pool [P, H, K, V].
struct StateStrides {
  int64_t n, h, k, v;
};

// States [N, H, K, V] that are read. "real" below is fp64 iff q is, else fp32.
struct StateTensor {
  const void* data;  // real; null: zeros
  StateStrides strides;
};

using StatePool = Pool<StateStrides>;

struct GatedDeltaRuleInputs {
  int64_t B, T, H, Hk, K, V;  // value head h reads query/key head h / (H / Hk)
  double scale;
  bool l2norm_qk;
  TokenTensor q;     // [B, T, Hk, K]
  TokenTensor k;     // [B, T, Hk, K], dtype of q
  TokenTensor v;     // [B, T, H, V], dtype of q
  TokenTensor g;     // [B, T, H], log decay; real on a CPU
  TokenTensor beta;  // [B, T, H]; real on a CPU
};

}  // namespace jet
