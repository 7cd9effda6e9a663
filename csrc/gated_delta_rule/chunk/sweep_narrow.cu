#include "csrc/gated_delta_rule/chunk/sweep.cuh"

namespace jet::hopper {

template void launch_sweep_part<true>(const SweepArguments& p, const SweepMaps& maps, bool outputs,
                                      cudaStream_t stream);

}  // namespace jet::hopper
