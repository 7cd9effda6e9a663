#include "csrc/dynamic_conv/dynamic_conv_kernel.cuh"

namespace jet::hopper {

template void launch_dynamic_conv_of<f16>(const DynamicConvLaunch&, int64_t, cudaStream_t);

}  // namespace jet::hopper
