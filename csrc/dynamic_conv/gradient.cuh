// What the backward kernels of the convolution share: the slope of the activation, and how gradients leave at the ends
// of a sequence.
//
// Positions of a sequence begin at -(W-1): those below 0 are the inputs that conv_state holds. The gradient of the
// input at position p is the sum of dz[p + (W-1) - w] taps[p + (W-1) - w, w] from the first of those tokens to the
// last, w = W-1 .. 0 backwards, plus what grad_conv_state_out has for it. It is dx for p >= 0, dconv_state below.
#pragma once

#include "csrc/dynamic_conv/window.cuh"

namespace jet::hopper {

struct ConvStateGradients {
  const void* of_out;  // grad_conv_state_out [N, D, W-1], or null: zeros
  void* of_in;         // dconv_state [N, D, W-1]
};

// d silu(z) / dz = s (1 + z (1 - s)) with s = 1 / (1 + e^-z); 1 without activation. No branch, as in activate().
__device__ inline float activation_slope(float z, bool silu) {
  const float s = fast_sigmoid(z), slope = s * (1.0f + z * (1.0f - s));
  return silu ? slope : 1.0f;
}

// grad_conv_state_out of P channels from d on for the input at `position` of a sequence of `length` tokens is added to
// `sum`.
template <class Element, int P, int W>
__device__ void add_gradient_of_state_out(float (&sum)[P], const void* of_out, int64_t n, int64_t D, int64_t d,
                                          int64_t position, int64_t length) {
  const int64_t j = position - length + (W - 1);
  if (of_out == nullptr || j < 0) return;
  const auto* from = static_cast<const uint16_t*>(of_out) + (n * D + d) * (W - 1) + j;
#pragma unroll
  for (int c = 0; c < P; ++c) sum[c] += unpack<Element>(from[c * (W - 1)]).x;
}

// Number `number` of the W - 1 inputs before a sequence, of P channels from d on; zeros where there is no state. With
// few registers, an element at a time.
template <int P, int W>
__device__ Elements<P> input_of_state(const ConvStates& states, int row, int64_t d, int number) {
  if (states.in == nullptr) return {};
  const auto* from = static_cast<const uint16_t*>(states.in) + row * states.stride + d * (W - 1) + number;
  return gather<P>([&](int c) { return static_cast<uint32_t>(from[c * (W - 1)]); });
}

// dconv_state of a sequence of no tokens is grad_conv_state_out. By warp `warp` of `warps`.
template <int W>
__device__ void gradients_of_empty_sequences(const ConvSequences& sequences, const ConvStateGradients& g, int64_t D,
                                             int64_t warp, int64_t warps) {
  copy_states_of_empty_sequences<W>(sequences, {.in = g.of_out, .out = g.of_in, .stride = D * (W - 1)}, D, warp, warps);
}

}  // namespace jet::hopper
