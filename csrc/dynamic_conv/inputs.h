// What every form of the dynamic convolution reads: the inputs x, and what came before them.
//
//   input(n, p) = x of token p of sequence n        0 <= p < length(n)
//               = conv_state[n, :, p + W-1]          -(W-1) <= p < 0 (zeros without conv_state)
//   conv_state_out[n, :, j] = input(n, length(n) - (W-1) + j)
#pragma once

#include <cstdint>

#include "csrc/common/dtype.h"

namespace jet {

constexpr int kMaxTaps = 4;

struct ConvInputs {
  Dtype dtype;            // of every floating-point pointer below and in the structs that hold this one
  int64_t B, T, D, W, N;  // N = B without cu_seqlens
  const void* x;          // [B, T, D], element (b, t, d) at b * x_stride[0] + t * x_stride[1] + d * x_stride[2]
  int64_t x_stride[3];
  const void* conv_state;      // [N, D, W-1] contiguous, or null: zeros
  const void* cu_seqlens;      // [N + 1], or null: N sequences of T tokens
  IndexType cu_seqlens_dtype;  // i64 on a CPU, where the offsets have been checked
};

}  // namespace jet
