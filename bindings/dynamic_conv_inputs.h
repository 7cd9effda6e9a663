// The arguments of the dynamic convolution's ops, and what their bindings check and fill in alike.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "csrc/dynamic_conv/inputs.h"

namespace jet::bindings {

// The last layer of the kernel generator, which makes the taps.
struct GeneratorTensors {
  Tensor hidden, weight;
  OptionalTensor bias;
  auto tie() const { return std::tie(hidden, weight, bias); }
};

// What a backward is given of the outputs' gradients.
struct ConvGradientTensors {
  Tensor grad_y;
  OptionalTensor grad_conv_state_out;
  auto tie() const { return std::tie(grad_y, grad_conv_state_out); }
};

inline void check_like(const Checks& checks, const char* name, const Tensor& t, const char* like_name,
                       const Tensor& like) {
  checks.dtype_like(name, t, like_name, like);
  checks.device(name, t, like_name, like);
}

inline void check_channels(const Checks& checks, const char* name, const Tensor& x) {
  if (checks.size("D") < 1) checks.fail(name, " dimension ", x.dim() - 1, " (D) must be at least 1, got 0");
}

inline bool is_number_of_taps(int64_t W) { return W >= kMinTaps && W <= kMaxTaps; }

// weight [D*W, R], bias [D*W]; hidden's shape has been checked. x: what is convolved, under the name that the op gives
// it. Binds W.
inline void check_generator(Checks& checks, const char* name, const Tensor& x, const GeneratorTensors& g) {
  check_like(checks, "hidden", g.hidden, name, x);
  checks.shape("weight", g.weight, {"D*W", "R"});
  check_like(checks, "weight", g.weight, name, x);
  check_channels(checks, name, x);
  const int64_t D = checks.size("D"), rows = checks.size("D*W");
  if (rows % D != 0 || !is_number_of_taps(rows / D))
    checks.fail("weight dimension 0 must be D*W with D = ", D, " (as in ", name, ") and W in ", kMinTaps, "..",
                kMaxTaps, ", got ", rows);
  checks.bind("W", rows / D, "from ", "weight");
  checks.bind("W-1", rows / D - 1, "from ", "weight");
  if (!g.bias) return;
  checks.shape("bias", *g.bias, {"D*W"});
  check_like(checks, "bias", *g.bias, name, x);
}

// cu_seqlens [N+1] and conv_state, or any tensor of its shape; returns the offsets where the host may read them.
inline std::vector<int64_t> check_sequences(Checks& checks, const Tensor& x, const OptionalTensor& conv_state,
                                            const OptionalTensor& cu_seqlens) {
  std::vector<int64_t> offsets = checks.sequences(cu_seqlens, "x", x);
  if (conv_state) {
    checks.shape("conv_state", *conv_state, {"N", "D", "W-1"});
    check_like(checks, "conv_state", *conv_state, "x", x);
  }
  return offsets;
}

inline void check_gradients(Checks& checks, const Tensor& x, const ConvGradientTensors& g) {
  checks.shape("grad_y", g.grad_y, {"B", "T", "D"});
  check_like(checks, "grad_y", g.grad_y, "x", x);
  if (!g.grad_conv_state_out) return;
  checks.shape("grad_conv_state_out", *g.grad_conv_state_out, {"N", "D", "W-1"});
  check_like(checks, "grad_conv_state_out", *g.grad_conv_state_out, "x", x);
}

inline const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline Tensor new_conv_state(const Checks& checks, const Tensor& x) {
  return allocate(x, {checks.size("N"), checks.size("D"), checks.size("W-1")});
}

// For the kernels and the CPU code. What is made here points into the tensors.
inline ConvInputs conv_inputs(const Checks& checks, const Tensor& x, const OptionalTensor& conv_state,
                              const IndexVector& cu_seqlens, bool silu) {
  return {.B = checks.size("B"),
          .T = checks.size("T"),
          .D = checks.size("D"),
          .W = checks.size("W"),
          .N = checks.size("N"),
          .silu = silu,
          .x = token_tensor(x),
          .conv_state = data(conv_state),
          .cu_seqlens = cu_seqlens};
}

inline TapGenerator tap_generator(const GeneratorTensors& g) {
  return {.R = g.weight.size(1),
          .hidden = token_tensor(g.hidden),
          .weight = g.weight.const_data_ptr(),
          .bias = data(g.bias)};
}

// [.., columns] in rows (kernel_takes.h): `t` if it is, else a copy.
inline Tensor as_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  const int64_t row_stride = t.stride(last - 1);
  const bool rows = t.stride(last) == 1 && row_stride % 8 == 0 && row_stride >= t.size(last) &&
                    reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  const bool flat = t.dim() == 2 || t.size(0) == 1 || t.stride(0) == t.size(1) * t.stride(1);
  return rows && flat ? t : aligned(t);
}

// What the CPU code reads, and what a Hopper kernel reads.
inline GeneratorTensors dense(const GeneratorTensors& g) {
  return {.hidden = g.hidden, .weight = dense(g.weight), .bias = dense(g.bias)};
}
inline GeneratorTensors as_rows(const GeneratorTensors& g) {
  return {.hidden = as_rows(g.hidden), .weight = aligned(g.weight), .bias = dense(g.bias)};
}

}  // namespace jet::bindings
