// And join: a file of its own would spend most of its time on the same headers.
#include "csrc/gated_delta_rule/chunk_join.cuh"
#include "csrc/gated_delta_rule/chunk_prepare.cuh"

namespace jet::hopper {

template void launch_prepare<64>(const PrepareArguments& p, const PrepareMaps& maps, cudaStream_t stream);
template void launch_prepare<96>(const PrepareArguments& p, const PrepareMaps& maps, cudaStream_t stream);
template void launch_prepare<128>(const PrepareArguments& p, const PrepareMaps& maps, cudaStream_t stream);
template void launch_prepare<192>(const PrepareArguments& p, const PrepareMaps& maps, cudaStream_t stream);
template void launch_prepare<256>(const PrepareArguments& p, const PrepareMaps& maps, cudaStream_t stream);

template void launch_join<64>(const JoinArguments& p, cudaStream_t stream);
template void launch_join<96>(const JoinArguments& p, cudaStream_t stream);
template void launch_join<128>(const JoinArguments& p, cudaStream_t stream);
template void launch_join<192>(const JoinArguments& p, cudaStream_t stream);
template void launch_join<256>(const JoinArguments& p, cudaStream_t stream);

}  // namespace jet::hopper
