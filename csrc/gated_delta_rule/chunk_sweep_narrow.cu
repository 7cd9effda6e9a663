#include "csrc/gated_delta_rule/chunk_sweep.cuh"

namespace jet::hopper {

template void launch_sweep<SweepConfig<64, true>>(SweepArguments p, const SweepMaps& maps, cudaStream_t stream);
template void launch_sweep<SweepConfig<64, false>>(SweepArguments p, const SweepMaps& maps, cudaStream_t stream);
template void launch_sweep<SweepConfig<96, true>>(SweepArguments p, const SweepMaps& maps, cudaStream_t stream);
template void launch_sweep<SweepConfig<96, false>>(SweepArguments p, const SweepMaps& maps, cudaStream_t stream);
template void launch_sweep<SweepConfig<128, true>>(SweepArguments p, const SweepMaps& maps, cudaStream_t stream);
template void launch_sweep<SweepConfig<128, false>>(SweepArguments p, const SweepMaps& maps, cudaStream_t stream);

}  // namespace jet::hopper
