// Tensors [.., C] as rows of C elements (StridedRows).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>

#include "bindings/torch_tensors.h"
#include "csrc/common/tensors.h"

namespace jet::bindings {

// The stride of dimensions [first, end) as one, if they have one. Of a dimension of size 1 the stride means nothing.
inline std::optional<int64_t> common_stride(const Tensor& t, int64_t first, int64_t end) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t stride = 0, next = 0, count = 1;
  for (int64_t i = end; i-- > first;) {
    if (sizes[i] == 1) continue;
    if (count == 1)
      stride = strides[i];
    else if (strides[i] != next)
      return std::nullopt;
    count *= sizes[i], next = strides[i] * sizes[i];
  }
  return stride;
}

// The stride from one row of `t` to the next, if all rows lie at one.
inline std::optional<int64_t> row_stride(const Tensor& t) { return common_stride(t, 0, t.dim() - 1); }

inline Tensor in_rows(const Tensor& t) { return row_stride(t) ? t : torch::stable::contiguous(t); }

// Of a tensor `in_rows`, which must outlive it.
inline StridedRows strided_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return {.data = t.const_data_ptr(), .row = *row_stride(t), .column = t.size(last) == 1 ? 1 : t.stride(last)};
}

inline int64_t row_count(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i < t.dim() - 1; ++i) rows *= t.size(i);
  return rows;
}

}  // namespace jet::bindings
