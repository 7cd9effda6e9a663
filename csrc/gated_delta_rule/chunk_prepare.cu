#include "csrc/gated_delta_rule/chunk_prepare.cuh"

namespace jet::hopper {

template void launch_prepare<PrepareConfig<64>>(const PrepareArguments& p, cudaStream_t stream);
template void launch_prepare<PrepareConfig<96>>(const PrepareArguments& p, cudaStream_t stream);
template void launch_prepare<PrepareConfig<128>>(const PrepareArguments& p, cudaStream_t stream);
template void launch_prepare<PrepareConfig<192>>(const PrepareArguments& p, cudaStream_t stream);
template void launch_prepare<PrepareConfig<256>>(const PrepareArguments& p, cudaStream_t stream);

}  // namespace jet::hopper
