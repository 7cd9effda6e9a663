#include "csrc/gated_delta_rule/chunk/backward/backward.cuh"
#include "csrc/gated_delta_rule/chunk/backward/reverse.cuh"

namespace jet::hopper {

void launch_reverse_f16(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream) {
  HopperHeadDims::dispatch(p.K, [&](auto K) { launch_reverse_kernel<ReverseConfig<K, f16>>(p, maps, stream); });
}

}  // namespace jet::hopper
