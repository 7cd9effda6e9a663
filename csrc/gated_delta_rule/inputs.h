// What the ops of the gated delta rule agree on: how their tensors are addressed, and the l2norm.
#pragma once

#include <cstdint>

#include "csrc/common/dtype.h"

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

// A pool of states [P, H, K, V], and which of its rows each sequence n < N has.
struct StatePool {
  Dtype dtype;
  int64_t P;
  void* data;
  StateStrides strides;
  const void* rows;      // [N]; negative: no row; null: row n. Each row is named once
  IndexType rows_dtype;  // i64 on a CPU, where the rows have been checked. On a device a row of P or more is no row
};

}  // namespace jet
