#include "csrc/gated_delta_rule/chunk_prepare.cuh"

namespace jet::hopper {

template void launch_prepare<64>(const PrepareArguments& p, const PrepareMaps& maps, cudaStream_t stream);
template void launch_prepare<96>(const PrepareArguments& p, const PrepareMaps& maps, cudaStream_t stream);
template void launch_prepare<128>(const PrepareArguments& p, const PrepareMaps& maps, cudaStream_t stream);
template void launch_prepare<192>(const PrepareArguments& p, const PrepareMaps& maps, cudaStream_t stream);
template void launch_prepare<256>(const PrepareArguments& p, const PrepareMaps& maps, cudaStream_t stream);

}  // namespace jet::hopper
