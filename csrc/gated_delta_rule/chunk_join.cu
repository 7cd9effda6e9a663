#include "csrc/gated_delta_rule/chunk_join.cuh"

namespace jet::hopper {

template void launch_join<64>(const JoinArguments& p, cudaStream_t stream);
template void launch_join<96>(const JoinArguments& p, cudaStream_t stream);
template void launch_join<128>(const JoinArguments& p, cudaStream_t stream);
template void launch_join<192>(const JoinArguments& p, cudaStream_t stream);
template void launch_join<256>(const JoinArguments& p, cudaStream_t stream);

}  // namespace jet::hopper
