// The passes of dynamic_conv_backward; each is compiled in a file of its own.
#pragma once

#include <cuda_runtime.h>

#include "csrc/dynamic_conv/gemm/backward_workspace.h"

namespace jet::hopper {

// A call and its workspace, on the current device.
struct DynamicConvBackwardCall {
  const DynamicConvBackwardParams& p;
  const BackwardWorkspace& at;
  char* workspace;
  int multiprocessors;
  cudaStream_t stream;

  static constexpr const char* op = "dynamic_conv_backward";
  int64_t tokens() const { return p.in.B * p.in.T; }
  void* dz() const { return workspace + at.dz; }
};

void launch_input_gradient(const DynamicConvBackwardCall& call);   // dz, dx, dconv_state
void launch_hidden_gradient(const DynamicConvBackwardCall& call);  // dhidden
void launch_weight_gradient(const DynamicConvBackwardCall& call);  // dweight, dbias

}  // namespace jet::hopper
