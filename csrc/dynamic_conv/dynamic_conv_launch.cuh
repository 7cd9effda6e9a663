// How dynamic_conv and dynamic_conv_step launch their kernel (dynamic_conv_kernel.cuh), without its headers.
#pragma once

#include "csrc/dynamic_conv/conv_window.cuh"

namespace jet::hopper {

struct DynamicConvArguments {
  ConvSequences sequences;
  ConvStates states;
  int64_t D;
  int panels;           // of 64 along R
  int tiles, per_part;  // of channels, in all and for a CTA
  bool silu;
  const void* bias;  // or null
  void* y;
};

// What dynamic_conv and dynamic_conv_step have in common: M tokens in rows.
struct DynamicConvLaunch {
  const char* op;
  Dtype dtype;
  int64_t D, R;
  const void *x, *hidden, *weight;
  int64_t x_stride, hidden_stride;
  DynamicConvArguments arguments;  // all but panels, tiles and per_part
};

// Instantiated per dtype: dynamic_conv_bf16.cu, dynamic_conv_f16.cu.
template <class Element>
void launch_dynamic_conv_of(const DynamicConvLaunch& l, int64_t W, cudaStream_t stream);

inline void launch_dynamic_conv(const DynamicConvLaunch& l, int64_t W, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  l.dtype == Dtype::bf16 ? launch_dynamic_conv_of<bf16>(l, W, on) : launch_dynamic_conv_of<f16>(l, W, on);
}

}  // namespace jet::hopper
