#include "csrc/gated_delta_rule/chunk/backward/backward.cuh"
#include "csrc/gated_delta_rule/chunk/backward/gradients.cuh"

namespace jet::hopper {

void launch_gradients_f16(int64_t K, const GradientArguments& p, const GradientMaps& maps, int ctas,
                          cudaStream_t stream) {
  HopperHeadDims::dispatch(K,
                           [&](auto dim) { launch_gradients_kernel<GradientConfig<dim, f16>>(p, maps, ctas, stream); });
}

}  // namespace jet::hopper
