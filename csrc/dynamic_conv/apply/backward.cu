// The launch of apply_dynamic_conv_backward.
#include "csrc/dynamic_conv/apply/apply_dynamic_conv.h"
#include "csrc/dynamic_conv/apply/backward.cuh"
#include "csrc/hopper/launch.h"

namespace jet {

void apply_dynamic_conv_backward_hopper(const ApplyDynamicConvBackwardParams& p, void* stream) {
  using namespace hopper;
  const char* const op = "apply_dynamic_conv_backward";
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.in.B * p.in.T == 0) return copy_all_states(op, p.in, p.grad_conv_state_out, p.dconv_state, on);
  const ApplyBackwardArguments arguments{.sequences = sequences_of(p.in),
                                         .states = states_of(p.in, nullptr),
                                         .gradients = {.of_out = p.grad_conv_state_out, .of_in = p.dconv_state},
                                         .D = p.in.D,
                                         .x_stride = row_stride(p.in, p.in.x),
                                         .dy_stride = row_stride(p.in, p.grad_y),
                                         .silu = p.in.silu,
                                         .x = p.in.x.data,
                                         .taps = p.taps,
                                         .dy = p.grad_y.data,
                                         .dx = p.dx,
                                         .dtaps = p.dtaps};
  constexpr int tokens = kBackwardRun * kBackwardWarps;
  const dim3 grid(static_cast<unsigned>((arguments.sequences.tokens + tokens - 1) / tokens),
                  static_cast<unsigned>((arguments.D + kBackwardChannels - 1) / kBackwardChannels));
  with_element_and_taps(p.in, [&](auto element, auto taps) {
    launch(op, {.grid = grid, .threads = kBackwardThreads}, on, apply_backward_kernel<decltype(element), taps>,
           arguments);
  });
}

}  // namespace jet
