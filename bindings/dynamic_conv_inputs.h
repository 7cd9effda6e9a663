// What the bindings of the dynamic convolution's ops check and fill in alike.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "bindings/checks.h"
#include "csrc/dynamic_conv/inputs.h"

namespace jet::bindings {

using OptionalTensor = std::optional<Tensor>;

inline void check_like(const Checks& checks, const char* name, const Tensor& t, const char* like_name,
                       const Tensor& like) {
  checks.dtype_like(name, t, like_name, like);
  checks.device(name, t, like_name, like);
}

inline void check_channels(const Checks& checks, const Tensor& x) {
  if (checks.size("D") < 1) checks.fail("x dimension ", x.dim() - 1, " (D) must be at least 1, got 0");
}

// Binds W from `rows` = D * W rows of the generator.
inline void bind_taps(Checks& checks, const char* name, int64_t rows) {
  const int64_t D = checks.size("D");
  if (rows % D != 0 || rows / D < 2 || rows / D > kMaxTaps)
    checks.fail(name, " dimension 0 must be D*W with D = ", D, " (as in x) and W in 2..", kMaxTaps, ", got ", rows);
  checks.bind("W", rows / D, "from ", name);
  checks.bind("W-1", rows / D - 1, "from ", name);
}

// weight [D*W, R], bias [D*W]
inline void check_generator(Checks& checks, const Tensor& x, const Tensor& hidden, const Tensor& weight,
                            const OptionalTensor& bias) {
  check_like(checks, "hidden", hidden, "x", x);
  checks.shape("weight", weight, {"D*W", "R"});
  check_like(checks, "weight", weight, "x", x);
  check_channels(checks, x);
  bind_taps(checks, "weight", weight.size(0));
  if (!bias) return;
  checks.shape("bias", *bias, {"D*W"});
  check_like(checks, "bias", *bias, "x", x);
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

inline void check_gradients(Checks& checks, const Tensor& x, const Tensor& grad_y,
                            const OptionalTensor& grad_conv_state_out) {
  checks.shape("grad_y", grad_y, {"B", "T", "D"});
  check_like(checks, "grad_y", grad_y, "x", x);
  if (!grad_conv_state_out) return;
  checks.shape("grad_conv_state_out", *grad_conv_state_out, {"N", "D", "W-1"});
  check_like(checks, "grad_conv_state_out", *grad_conv_state_out, "x", x);
}

inline const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

template <std::size_t rank>
void set_strides(const Tensor& t, int64_t (&stride)[rank]) {
  for (std::size_t i = 0; i < rank; ++i) stride[i] = t.stride(static_cast<int64_t>(i));
}

inline Tensor new_conv_state(const Checks& checks, const Tensor& x) {
  return allocate(x, {checks.size("N"), checks.size("D"), checks.size("W-1")});
}

// For a launch: cu_seqlens, contiguous, stays where it is. The pointers stay valid as long as x, conv_state
// (contiguous) and cu_seqlens do.
inline ConvInputs device_conv_inputs(const Checks& checks, const Tensor& x, const OptionalTensor& conv_state,
                                     const OptionalTensor& cu_seqlens) {
  ConvInputs in{};
  in.dtype = kernel_dtype(x);
  in.B = checks.size("B"), in.T = checks.size("T"), in.D = checks.size("D"), in.W = checks.size("W"),
  in.N = checks.size("N");
  in.x = x.const_data_ptr();
  set_strides(x, in.x_stride);
  in.conv_state = data(conv_state);
  in.cu_seqlens = data(cu_seqlens);
  if (cu_seqlens) in.cu_seqlens_dtype = index_type(*cu_seqlens);
  return in;
}

// For a call on the host: `offsets` are what check_sequences returned.
inline ConvInputs conv_inputs(const Checks& checks, const Tensor& x, const OptionalTensor& conv_state,
                              const std::vector<int64_t>& offsets) {
  ConvInputs in = device_conv_inputs(checks, x, conv_state, std::nullopt);
  if (!offsets.empty()) in.cu_seqlens = offsets.data(), in.cu_seqlens_dtype = IndexType::i64;
  return in;
}

// What a kernel reads 16 bytes at a time: `t` if it is contiguous and aligned, else a copy.
inline Tensor aligned(const Tensor& t) {
  const bool is = t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  return is ? t : torch::stable::clone(dense(t));
}
inline OptionalTensor aligned(const OptionalTensor& t) { return t ? OptionalTensor(aligned(*t)) : t; }

// [.., columns] in rows (kernel_takes.h): `t` if it is, else a copy.
inline Tensor as_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  const int64_t row_stride = t.stride(last - 1);
  const bool rows = t.stride(last) == 1 && row_stride % 8 == 0 && row_stride >= t.size(last) &&
                    reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  const bool flat = t.dim() == 2 || t.size(0) == 1 || t.stride(0) == t.size(1) * t.stride(1);
  return rows && flat ? t : aligned(t);
}

}  // namespace jet::bindings
