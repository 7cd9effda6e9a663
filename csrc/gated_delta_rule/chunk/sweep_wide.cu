#include "csrc/gated_delta_rule/chunk/sweep.cuh"

namespace jet::hopper {

template void launch_sweep<SweepConfig<192, true>>(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream);
template void launch_sweep<SweepConfig<192, false>>(const SweepArguments& p, const SweepMaps& maps,
                                                    cudaStream_t stream);
template void launch_sweep<SweepConfig<256, true>>(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream);
template void launch_sweep<SweepConfig<256, false>>(const SweepArguments& p, const SweepMaps& maps,
                                                    cudaStream_t stream);

}  // namespace jet::hopper
