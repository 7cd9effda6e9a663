// dynamic_conv and dynamic_conv_step: two kernels serve both, by the number of tokens. All instances are compiled here,
// because reading CUTLASS's headers takes as long as compiling them.
#include "csrc/dynamic_conv/gemm/pingpong.cuh"
#include "csrc/dynamic_conv/gemm/single_tile.cuh"
#include "csrc/dynamic_conv/prefill/dynamic_conv.h"
#include "csrc/dynamic_conv/step/dynamic_conv_step.h"

namespace jet {
namespace hopper {
namespace {

// The single-tile kernel in the tile for so many tokens.
template <class Element, int W, bool silu_hidden>
void launch_few_tokens(const DynamicConvCall& call, cudaStream_t stream) {
  // 64 tokens, 16 channels: one m64n64 instruction a k16 step, and D = 3072 gives 192 CTAs, 4096 gives 256; two fit
  // each of 132 multiprocessors, so all stream at once. For W = 4 alone: no model has 2 or 3.
  if constexpr (W == 4)
    if (call.sequences.tokens <= 64)
      return launch_single_tile<SingleTileConfig<Element, W, 4, 1, silu_hidden>>(call, stream);
  // 128 tokens, 32 channels: 96 and 128 CTAs. Every tile of channels reads all of hidden again, which at 128 tokens
  // and 16 channels would be twice the weights.
  launch_single_tile<SingleTileConfig<Element, W, 8, 2, silu_hidden>>(call, stream);
}

// Chooses the kernel.
void launch_dynamic_conv(const DynamicConvCall& call, cudaStream_t stream) {
  with_element_and_taps(call.in, [&](auto element, auto taps) {
    using Element = decltype(element);
    constexpr int W = taps;
    // Ping-pong lets two tiles of 128 tokens share the weights, and walks over channels: with one tile of tokens there
    // is nothing to share.
    if (call.sequences.tokens > 128 && call.generator.R <= kResidentR)
      return launch_pingpong<PingpongConfig<Element, W>>(call, stream);
    launch_few_tokens<Element, W, false>(call, stream);
  });
}

DynamicConvCall step_call(const char* op, const DynamicConvStepParams& p) {
  ConvSequences sequences = sequences_of(p.in);
  sequences.rows = p.pool.rows, sequences.P = p.pool.P;
  return {.op = op,
          .in = p.in,
          .generator = p.generator,
          .sequences = sequences,
          .states = {.in = p.pool.data, .out = p.pool.data, .stride = p.pool.strides.n},
          .y = p.y};
}

}  // namespace
}  // namespace hopper

void dynamic_conv_hopper(const DynamicConvParams& p, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.in.B * p.in.T == 0) return hopper::copy_all_states("dynamic_conv", p.in, p.in.conv_state, p.conv_state_out, on);
  hopper::launch_dynamic_conv({.op = "dynamic_conv",
                               .in = p.in,
                               .generator = p.generator,
                               .sequences = hopper::sequences_of(p.in),
                               .states = hopper::states_of(p.in, p.conv_state_out),
                               .y = p.y},
                              on);
}

void dynamic_conv_step_hopper(const DynamicConvStepParams& p, void* stream) {
  if (p.in.N == 0) return;
  hopper::launch_dynamic_conv(hopper::step_call("dynamic_conv_step", p), static_cast<cudaStream_t>(stream));
}

void dynamic_conv_step_of_silu_hopper(const DynamicConvStepParams& p, void* stream) {
  if (p.in.N == 0) return;
  hopper::with_element_and_taps(p.in, [&](auto element, auto taps) {
    constexpr int W = taps;
    hopper::launch_few_tokens<decltype(element), W, true>(hopper::step_call("jet_block_step", p),
                                                          static_cast<cudaStream_t>(stream));
  });
}

}  // namespace jet
