#include "csrc/dynamic_conv/dynamic_conv_step.h"

#include "csrc/dynamic_conv/dynamic_conv_launch.cuh"

namespace jet {

// A step is a convolution over N sequences of one token, whose states are rows of the pool.
void dynamic_conv_step_hopper(const DynamicConvStepParams& p, void* stream) {
  if (p.N == 0) return;
  hopper::DynamicConvLaunch l{"dynamic_conv_step", p.dtype, p.D, p.R, p.W, p.x, p.hidden, p.weight, p.x_stride[0], p.hidden_stride[0], {}};
  hopper::DynamicConvArguments& a = l.arguments;
  a.sequences = {p.N, 1, p.N, nullptr, IndexType::i64, p.state_rows, p.state_rows_dtype, p.P};
  a.states = {p.conv_state, p.conv_state, p.state_stride[0]};
  a.D = p.D, a.silu = p.silu, a.bias = p.bias, a.y = p.y;
  hopper::launch_dynamic_conv(l, stream);
}

}  // namespace jet
