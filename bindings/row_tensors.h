// Tensors [.., C] as rows of C elements (StridedRows).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "bindings/torch_tensors.h"
#include "csrc/common/tensors.h"

namespace jet::bindings {

// The stride from one row of `t` to the next, if all rows lie at one. Of a dimension of size 1 the stride means
// nothing.
inline std::optional<int64_t> row_stride(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t stride = 0, rows = 1;  // of the dimensions so far, from the last but one outwards
  for (int64_t i = t.dim() - 2; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (rows == 1)
      stride = strides[i];
    else if (strides[i] != stride * rows)
      return std::nullopt;
    rows *= sizes[i];
  }
  return stride;
}

inline Tensor in_rows(const Tensor& t) { return row_stride(t) ? t : torch::stable::contiguous(t); }

// Of a tensor `in_rows`, which must outlive it.
inline StridedRows strided_rows(const Tensor& t) {
  return {.data = t.const_data_ptr(), .row = *row_stride(t), .column = t.stride(t.dim() - 1)};
}

inline int64_t row_count(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i < t.dim() - 1; ++i) rows *= t.size(i);
  return rows;
}

}  // namespace jet::bindings
