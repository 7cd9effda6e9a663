// dynamic_conv_backward: its passes, one behind the other.
#include "csrc/dynamic_conv/gemm/backward_launch.h"

#include "csrc/dynamic_conv/window.cuh"
#include "csrc/hopper/device.h"

namespace jet {

int64_t dynamic_conv_backward_workspace(const DynamicConvBackwardParams& p) {
  return hopper::backward_workspace(p, hopper::current_device_properties().multiprocessors).bytes;
}

void dynamic_conv_backward_hopper(const DynamicConvBackwardParams& p, void* workspace, void* stream) {
  using namespace hopper;
  const auto on = static_cast<cudaStream_t>(stream);
  if (p.in.B * p.in.T == 0) {
    const char* const op = DynamicConvBackwardCall::op;
    const size_t rows = p.in.D * p.in.W;
    check(cudaMemsetAsync(p.dweight, 0, rows * p.generator.R * 2, on), op);
    check(cudaMemsetAsync(p.dbias, 0, rows * 2, on), op);
    return copy_all_states(op, p.in, p.grad_conv_state_out, p.dconv_state, on);
  }
  const int multiprocessors = current_device_properties().multiprocessors;
  const BackwardWorkspace at = backward_workspace(p, multiprocessors);
  const DynamicConvBackwardCall call{
      .p = p, .at = at, .workspace = static_cast<char*>(workspace), .multiprocessors = multiprocessors, .stream = on};
  launch_input_gradient(call);
  launch_hidden_gradient(call);
  launch_weight_gradient(call);
}

}  // namespace jet
