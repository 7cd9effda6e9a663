// What jet::linear, linear_int8 and linear_int4 have in common: their checks, and their arguments as csrc/linear takes
// them.
#pragma once

#include <vector>

#include "bindings/arguments.h"
#include "bindings/checks.h"
#include "bindings/row_tensors.h"
#include "csrc/linear/linear.h"

namespace jet::bindings {

// x [..., C]; binds C.
inline void check_rows(Checks& checks, const Tensor& x) {
  if (!x.defined()) checks.fail("x must be a Tensor, got None");
  if (x.dim() < 1 || x.dim() > 8)
    checks.fail("x must have 1 to 8 dimensions [...,C], got ", x.dim(), " with shape ", shape_text(x));
  checks.floating("x", x);
  checks.bind("C", x.size(x.dim() - 1), "as in ", "x");
}

inline void check_bias(Checks& checks, const Tensor& x, const OptionalTensor& bias) {
  if (!bias) return;
  checks.shape("bias", *bias, {"P"});
  checks.dtype_like("bias", *bias, "x", x);
  checks.device("bias", *bias, "x", x);
}

// scale [P, G]; binds G. `unit`: a group has a multiple of so many columns.
inline void check_scale(Checks& checks, const Tensor& x, const Tensor& scale, int64_t unit) {
  checks.shape("scale", scale, {"P", "G"});
  checks.dtype("scale", scale, {ScalarType::Float});
  checks.device("scale", scale, "x", x);
  const int64_t C = checks.size("C"), G = checks.size("G");
  if (G < 1 || C % G != 0) checks.fail("scale dimension 1 (G) must divide C = ", C, " (as in x), got ", G);
  if (C / G % unit != 0)
    checks.fail("scale dimension 1 (G) must give groups of a multiple of ", unit, " columns, got ", C / G, " = C / G");
}

inline Tensor with_dense_rows(const Tensor& weight) {
  return weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight);
}

// y [..., P]
inline Tensor allocate_outputs(const Checks& checks, const Tensor& x) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = checks.size("P");
  return allocate(x, {sizes.data(), sizes.size()});
}

// All tensors have passed the checks; x is in rows, scale and bias are contiguous, rows of weight have unit stride.
inline LinearParams linear_params(const Tensor& x, const Tensor& weight, const OptionalTensor& scale,
                                  const OptionalTensor& bias, Tensor& y) {
  const StridedRows rows = strided_rows(x);
  return {.dtype = kernel_dtype(x),
          .N = row_count(x),
          .C = x.size(x.dim() - 1),
          .P = weight.size(0),
          .G = scale ? scale->size(1) : 1,
          .x = rows.data,
          .x_row = rows.row,
          .x_column = rows.column,
          .weight = weight.const_data_ptr(),
          .weight_row = weight.stride(0),
          .scale = scale ? static_cast<const float*>(scale->const_data_ptr()) : nullptr,
          .bias = bias ? bias->const_data_ptr() : nullptr,
          .y = y.mutable_data_ptr()};
}

}  // namespace jet::bindings
