// The pass of sweep that leaves S0 and U' of every chunk.
#include "csrc/gated_delta_rule/chunk/backward/backward.cuh"
#include "csrc/gated_delta_rule/chunk/sweep.cuh"

namespace jet::hopper {

void launch_states(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream) {
  HopperHeadDims::dispatch(p.K,
                           [&](auto K) { launch_sweep_kernel<SweepConfig<K, SweepPass::states>>(p, maps, stream); });
}

}  // namespace jet::hopper
