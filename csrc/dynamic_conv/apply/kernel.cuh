// The convolution with explicit taps, bound by reading them. A thread has 8 channels and a run of tokens, whose inputs
// pass through its registers as a sliding window: x is read once but for the halo of W - 1 tokens a run.
#pragma once

#include "csrc/dynamic_conv/window.cuh"

namespace jet::hopper {

constexpr int kRun = 32;  // tokens: (W - 1) / 32 of x are read twice
constexpr int kApplyThreads = 128;

struct ApplyArguments {
  ConvSequences sequences;
  ConvStates states;
  int64_t D, x_stride;
  bool silu;
  const void *x, *taps;  // [tokens, D] in rows, [tokens, D, W]
  void* y;               // [tokens, D]
};

template <class Element, int W>
__device__ void apply_token(const ApplyArguments& p, const Elements<8> (&window)[W], int64_t m, int64_t d) {
  Elements<8> x[W];
#pragma unroll
  for (int w = 0; w < W; ++w) x[w] = window[w];
  const TokenPlace place = place_of_token<W>(p.sequences, m);
  if (place.position < W - 1) begin_of_sequence(x, load_state<8, W>(p.states, place, d), place.position);
  Elements<8> raw[W];  // taps [8, W]
  const auto* from = static_cast<const uint16_t*>(p.taps) + (m * p.D + d) * W;
#pragma unroll
  for (int i = 0; i < W; ++i) raw[i] = load_elements<8>(from + 8 * i);
  float taps[8 * W], z[8] = {};
#pragma unroll
  for (int i = 0; i < W; ++i) {
    float eight[8];
    unpack_elements<Element>(eight, raw[i]);
#pragma unroll
    for (int c = 0; c < 8; ++c) taps[8 * i + c] = eight[c];
  }
#pragma unroll
  for (int w = 0; w < W; ++w) {
    float input[8];
    unpack_elements<Element>(input, x[w]);
#pragma unroll
    for (int c = 0; c < 8; ++c) z[c] += taps[c * W + w] * input[c];  // z += taps[t, d, w] x[t - (W-1) + w, d]
  }
  Elements<8> y = activate<Element>(z, p.silu);
  if (place.outside) y = {};
  store_elements(static_cast<uint16_t*>(p.y) + m * p.D + d, y);
  if (place.last && !place.outside) end_of_sequence(x, p.states, place, d);
}

template <class Element, int W>
__global__ void __launch_bounds__(kApplyThreads, 1) apply_kernel(const __grid_constant__ ApplyArguments p) {
  const int64_t d = (int64_t{blockIdx.y} * kApplyThreads + threadIdx.x) * 8, m0 = int64_t{blockIdx.x} * kRun;
  if (blockIdx.y == 0)
    copy_states_of_empty_sequences<W>(p.sequences, p.states, p.D,
                                      int64_t{blockIdx.x} * (kApplyThreads / 32) + threadIdx.x / 32,
                                      int64_t{gridDim.x} * (kApplyThreads / 32));
  if (d >= p.D) return;
  const auto input = [&](int64_t m) {
    if (m < 0 || m >= p.sequences.tokens) return Elements<8>{};
    return load_elements<8>(static_cast<const uint16_t*>(p.x) + m * p.x_stride + d);
  };
  Elements<8> window[W];
#pragma unroll
  for (int w = 1; w < W; ++w) window[w] = input(m0 - W + w);
  for (int64_t m = m0; m < m0 + kRun && m < p.sequences.tokens; ++m) {
#pragma unroll
    for (int w = 0; w < W - 1; ++w) window[w] = window[w + 1];
    window[W - 1] = input(m);
    apply_token<Element, W>(p, window, m, d);
  }
}

}  // namespace jet::hopper
