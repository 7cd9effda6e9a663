// All kernels of the generated convolution in one file: reading CUTLASS's headers takes longer than compiling the kernels.
#include "csrc/dynamic_conv/dynamic_conv_large.cuh"
#include "csrc/dynamic_conv/dynamic_conv_small.cuh"

namespace jet::hopper {

template <class Element>
void launch_dynamic_conv_of(const DynamicConvLaunch& l, cudaStream_t stream) {
  // The large kernel lets two tiles of 128 tokens share the weights, and walks over channels: with one tile there is nothing to share.
  if (l.arguments.sequences.tokens > 128 && l.R <= kResidentR) return launch_large_of<Element>(l, stream);
  launch_small_of<Element>(l, stream);
}

void launch_dynamic_conv(const DynamicConvLaunch& l, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  l.dtype == Dtype::bf16 ? launch_dynamic_conv_of<bf16>(l, on) : launch_dynamic_conv_of<f16>(l, on);
}

}  // namespace jet::hopper
