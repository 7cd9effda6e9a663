#include "csrc/gated_delta_rule/chunk/sweep.cuh"

namespace jet::hopper {

template void launch_sweep<SweepConfig<64, true>>(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream);
template void launch_sweep<SweepConfig<64, false>>(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream);
template void launch_sweep<SweepConfig<96, true>>(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream);
template void launch_sweep<SweepConfig<96, false>>(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream);
template void launch_sweep<SweepConfig<128, true>>(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream);
template void launch_sweep<SweepConfig<128, false>>(const SweepArguments& p, const SweepMaps& maps,
                                                    cudaStream_t stream);

}  // namespace jet::hopper
