// dynamic_conv and dynamic_conv_step: two kernels serve both. All instances are compiled here, because reading
// CUTLASS's headers takes as long as compiling them.
#include "csrc/dynamic_conv/prefill/dynamic_conv.h"

#include "csrc/dynamic_conv/prefill/large.cuh"
#include "csrc/dynamic_conv/small.cuh"
#include "csrc/dynamic_conv/step/dynamic_conv_step.h"

namespace jet {
namespace hopper {

template <class Element>
void launch_dynamic_conv(const DynamicConvLaunch& l, cudaStream_t stream) {
  // The large kernel lets two tiles of 128 tokens share the weights, and walks over channels: with one tile there is
  // nothing to share.
  if (l.arguments.sequences.tokens > 128 && l.R <= kResidentR) return launch_large_of<Element>(l, stream);
  launch_small_of<Element>(l, stream);
}

void launch_dynamic_conv(const DynamicConvLaunch& l, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  l.dtype == Dtype::bf16 ? launch_dynamic_conv<bf16>(l, on) : launch_dynamic_conv<f16>(l, on);
}

}  // namespace hopper

void dynamic_conv_hopper(const DynamicConvParams& p, void* stream) {
  const ConvInputs& in = p.in;
  const int64_t tokens = in.B * in.T, state_stride = in.D * (in.W - 1);
  if (tokens == 0)
    return hopper::copy_states("dynamic_conv", in.conv_state, p.conv_state_out, in.N * state_stride * 2,
                               static_cast<cudaStream_t>(stream));
  hopper::DynamicConvLaunch l{"dynamic_conv", in.dtype,           in.D, p.R, in.W, in.x, p.hidden, p.weight,
                              in.x_stride[1], p.hidden_stride[1], {}};
  hopper::DynamicConvArguments& a = l.arguments;
  a.sequences = {tokens, in.T, in.N, in.cu_seqlens, in.cu_seqlens_dtype, nullptr, IndexType::i64, in.N};
  a.states = {in.conv_state, p.conv_state_out, state_stride};
  a.D = in.D, a.silu = p.silu, a.bias = p.bias, a.y = p.y;
  hopper::launch_dynamic_conv(l, stream);
}

// A step is a convolution over N sequences of one token, whose states are rows of the pool.
void dynamic_conv_step_hopper(const DynamicConvStepParams& p, void* stream) {
  if (p.N == 0) return;
  hopper::DynamicConvLaunch l{"dynamic_conv_step", p.dtype, p.D, p.R, p.W, p.x, p.hidden, p.weight, p.x_stride[0],
                              p.hidden_stride[0],  {}};
  hopper::DynamicConvArguments& a = l.arguments;
  a.sequences = {p.N, 1, p.N, nullptr, IndexType::i64, p.state_rows, p.state_rows_dtype, p.P};
  a.states = {p.conv_state, p.conv_state, p.state_stride[0]};
  a.D = p.D, a.silu = p.silu, a.bias = p.bias, a.y = p.y;
  hopper::launch_dynamic_conv(l, stream);
}

}  // namespace jet
