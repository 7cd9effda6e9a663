// What the ops of the dynamic convolution read: the inputs x and what came before them, and the generator of the taps.
//
//   input(n, p) = x of token p of sequence n        0 <= p < length(n)
//               = conv_state[n, :, p + W-1]          -(W-1) <= p < 0 (zeros without conv_state)
//   conv_state_out[n, :, j] = input(n, length(n) - (W-1) + j)
#pragma once

#include <cstdint>
#include <type_traits>

#include "csrc/common/tensors.h"

namespace jet {

constexpr int kMinTaps = 2, kMaxTaps = 4;  // W

struct ConvInputs {
  int64_t B, T, D, W, N;   // N sequences: B of T tokens, or as cu_seqlens says with B = 1
  bool silu;               // the activation of y
  TokenTensor x;           // [B, T, D]. Its dtype is that of all floating-point tensors of the call
  const void* conv_state;  // [N, D, W-1] contiguous, or null: zeros
  IndexVector cu_seqlens;  // [N + 1]
};

// The last layer of the kernel generator: taps[b,t,d,w] = sum_r weight[d*W+w, r] hidden[b,t,r] + bias[d*W+w]
struct TapGenerator {
  int64_t R;
  TokenTensor hidden;  // [B, T, R]
  const void* weight;  // [D*W, R] contiguous
  const void* bias;    // [D*W] contiguous, or null: zeros
};

// Element strides of a pool of states [P, D, W-1].
struct ConvStateStrides {
  int64_t n, d, w;
};

using ConvStatePool = Pool<ConvStateStrides>;

// f(std::integral_constant<int, W>()) for the number of taps of a call, which the binding has checked.
template <int W = kMinTaps, class F>
void with_taps(int64_t taps, const F& f) {
  if (taps == W) return f(std::integral_constant<int, W>());
  if constexpr (W < kMaxTaps)
    with_taps<W + 1>(taps, f);
  else
    __builtin_trap();
}

}  // namespace jet
