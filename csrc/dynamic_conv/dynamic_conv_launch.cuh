// How dynamic_conv and dynamic_conv_step launch their kernels, without their headers.
#pragma once

#include "csrc/dynamic_conv/conv_sequences.h"

namespace jet::hopper {

struct DynamicConvArguments {
  ConvSequences sequences;
  ConvStates states;
  int64_t D;
  int panels;  // of 64 along R
  bool silu;
  const void* bias;  // or null
  void* y;
};

// What dynamic_conv and dynamic_conv_step have in common: M tokens in rows.
struct DynamicConvLaunch {
  const char* op;
  Dtype dtype;
  int64_t D, R, W;
  const void *x, *hidden, *weight;
  int64_t x_stride, hidden_stride;
  DynamicConvArguments arguments;  // all but panels
};

void launch_dynamic_conv(const DynamicConvLaunch& l, void* stream);  // dynamic_conv_kernels.cu

}  // namespace jet::hopper
