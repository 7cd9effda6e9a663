// What the ops of the gated delta rule agree on: how their tensors are addressed, and the l2norm.
#pragma once

#include <cstdint>

namespace jet {

constexpr double kL2NormEps = 1e-6;  // x / sqrt(sum x^2 + kL2NormEps)

// Element strides of a [B, T, heads, D] tensor, or of [B, T, heads] with d = 0.
struct TokenStrides {
  int64_t b, t, h, d;
};

// Element strides of states [N, H, K, V], or of a pool [P, H, K, V].
struct StateStrides {
  int64_t n, h, k, v;
};

}  // namespace jet
