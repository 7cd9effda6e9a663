#include "csrc/dynamic_conv/dynamic_conv.h"

#include "csrc/dynamic_conv/dynamic_conv_launch.cuh"

namespace jet {

void dynamic_conv_hopper(const DynamicConvParams& p, void* stream) {
  const ConvInputs& in = p.in;
  const int64_t tokens = in.B * in.T, state_stride = in.D * (in.W - 1);
  if (tokens == 0) return hopper::copy_states("dynamic_conv", in.conv_state, p.conv_state_out, in.N * state_stride * 2, static_cast<cudaStream_t>(stream));
  hopper::DynamicConvLaunch l{"dynamic_conv", in.dtype, in.D, p.R, in.W, in.x, p.hidden, p.weight, in.x_stride[1], p.hidden_stride[1], {}};
  hopper::DynamicConvArguments& a = l.arguments;
  a.sequences = {tokens, in.T, in.N, in.cu_seqlens, in.cu_seqlens_dtype, nullptr, IndexType::i64, in.N};
  a.states = {in.conv_state, p.conv_state_out, state_stride};
  a.D = in.D, a.silu = p.silu, a.bias = p.bias, a.y = p.y;
  hopper::launch_dynamic_conv(l, stream);
}

}  // namespace jet
