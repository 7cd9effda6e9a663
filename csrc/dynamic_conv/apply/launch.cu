// The launch of apply_dynamic_conv.
#include "csrc/dynamic_conv/apply/apply_dynamic_conv.h"
#include "csrc/dynamic_conv/apply/kernel.cuh"
#include "csrc/hopper/launch.h"

namespace jet {

void apply_dynamic_conv_hopper(const ApplyDynamicConvParams& p, void* stream) {
  using namespace hopper;
  const char* const op = "apply_dynamic_conv";
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.in.B * p.in.T == 0) return copy_all_states(op, p.in, p.in.conv_state, p.conv_state_out, on);
  const ApplyArguments arguments{.sequences = sequences_of(p.in),
                                 .states = states_of(p.in, p.conv_state_out),
                                 .D = p.in.D,
                                 .x_stride = row_stride(p.in, p.in.x),
                                 .silu = p.in.silu,
                                 .x = p.in.x.data,
                                 .taps = p.taps,
                                 .y = p.y};
  const dim3 grid(static_cast<unsigned>((arguments.sequences.tokens + kRun - 1) / kRun),
                  static_cast<unsigned>((arguments.D / 8 + kApplyThreads - 1) / kApplyThreads));
  with_element_and_taps(p.in, [&](auto element, auto taps) {
    launch(op, {.grid = grid, .threads = kApplyThreads}, on, apply_kernel<decltype(element), taps>, arguments);
  });
}

}  // namespace jet
