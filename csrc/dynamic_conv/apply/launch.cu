// The convolution with explicit kernels: bound by reading the kernels. A thread has 8 channels and a run of tokens,
// whose inputs pass through its registers as a window: x is read once but for W - 1 tokens a run.
#include "csrc/dynamic_conv/apply/apply_dynamic_conv.h"

#include "csrc/dynamic_conv/window.cuh"
#include "csrc/hopper/launch.h"

namespace jet {
namespace hopper {

constexpr int kRun = 32;  // tokens: (W - 1) / 32 of x are read twice
constexpr int kApplyThreads = 128;

struct ApplyArguments {
  ConvSequences sequences;
  ConvStates states;
  int64_t D, x_stride;
  bool silu;
  const void *x, *kernels;
  void* y;
};

template <class Element, int W>
__device__ void apply_token(const ApplyArguments& p, const Elements<8> (&window)[W], int64_t m, int64_t d) {
  Elements<8> x[W];
#pragma unroll
  for (int w = 0; w < W; ++w) x[w] = window[w];
  const TokenPlace place = place_of_token<W>(p.sequences, m);
  if (place.position < W - 1) begin_of_sequence(x, load_state<8, W>(p.states, place, d), place.position);
  Elements<8> raw[W];  // kernels [8, W]
  const auto* from = static_cast<const uint16_t*>(p.kernels) + (m * p.D + d) * W;
#pragma unroll
  for (int i = 0; i < W; ++i) raw[i] = load_elements<8>(from + 8 * i);
  float kernels[8 * W], z[8] = {};
#pragma unroll
  for (int i = 0; i < W; ++i) {
    float eight[8];
    unpack_elements<Element>(eight, raw[i]);
#pragma unroll
    for (int c = 0; c < 8; ++c) kernels[8 * i + c] = eight[c];
  }
#pragma unroll
  for (int w = 0; w < W; ++w) {
    float input[8];
    unpack_elements<Element>(input, x[w]);
#pragma unroll
    for (int c = 0; c < 8; ++c) z[c] += kernels[c * W + w] * input[c];  // z += kernel[t, d, w] x[t - (W-1) + w, d]
  }
  Elements<8> y = activate<Element>(z, p.silu);
  if (place.outside) y = {};
  store_elements(static_cast<uint16_t*>(p.y) + m * p.D + d, y);
  if (place.last && !place.outside) end_of_sequence(x, p.states, place, d);
}

template <class Element, int W>
__global__ void __launch_bounds__(kApplyThreads, 1) apply_kernel(const __grid_constant__ ApplyArguments p) {
  const int64_t d = (int64_t{blockIdx.y} * kApplyThreads + threadIdx.x) * 8, m0 = int64_t{blockIdx.x} * kRun;
  if (p.sequences.cu_seqlens != nullptr && blockIdx.y == 0)
    for (int64_t n = int64_t{blockIdx.x} * (kApplyThreads / 32) + threadIdx.x / 32; n < p.sequences.N;
         n += int64_t{gridDim.x} * (kApplyThreads / 32))
      if (sequence_bound(p.sequences, n) == sequence_bound(p.sequences, n + 1)) pass_state_on<W>(p.states, n, p.D);
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

template <class Element>
void launch_apply(const ApplyArguments& p, int64_t W, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((p.sequences.tokens + kRun - 1) / kRun),
                  static_cast<unsigned>((p.D / 8 + kApplyThreads - 1) / kApplyThreads));
  auto* const kernel = W == 2 ? apply_kernel<Element, 2> : W == 3 ? apply_kernel<Element, 3> : apply_kernel<Element, 4>;
  launch("apply_dynamic_conv", {grid, kApplyThreads}, stream, kernel, p);
}

}  // namespace hopper

void apply_dynamic_conv_hopper(const ApplyDynamicConvParams& p, void* stream) {
  const ConvInputs& in = p.in;
  const int64_t tokens = in.B * in.T, state_stride = in.D * (in.W - 1);
  auto* const cuda_stream = static_cast<cudaStream_t>(stream);
  if (tokens == 0)
    return hopper::copy_states("apply_dynamic_conv", in.conv_state, p.conv_state_out, in.N * state_stride * 2,
                               cuda_stream);
  const hopper::ApplyArguments a{
      {tokens, in.T, in.N, in.cu_seqlens, in.cu_seqlens_dtype, nullptr, IndexType::i64, in.N},
      {in.conv_state, p.conv_state_out, state_stride},
      in.D,
      in.x_stride[1],
      p.silu,
      in.x,
      p.kernels,
      p.y};
  if (in.dtype == Dtype::bf16)
    hopper::launch_apply<bf16>(a, in.W, cuda_stream);
  else
    hopper::launch_apply<f16>(a, in.W, cuda_stream);
}

}  // namespace jet
