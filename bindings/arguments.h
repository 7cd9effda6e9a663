// Checked tensors as the kernels take them (csrc/common/tensors.h). What is made here points into the tensors.
#pragma once

#include <vector>

#include "bindings/torch_tensors.h"
#include "csrc/common/tensors.h"

namespace jet::bindings {

inline Dtype kernel_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: return Dtype::f32;
  }
}

// [B, T, heads, D], [B, T, D] or [N, D]
inline TokenTensor token_tensor(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return {.data = t.const_data_ptr(),
          .dtype = kernel_dtype(t),
          .strides = {
              .b = t.stride(0), .t = last > 1 ? t.stride(1) : 0, .h = last > 2 ? t.stride(2) : 0, .d = t.stride(last)}};
}

// Integers where they are; the caller has made them contiguous.
inline IndexVector index_vector(const Tensor& t) {
  return {.data = t.const_data_ptr(), .type = t.scalar_type() == ScalarType::Int ? IndexType::i32 : IndexType::i64};
}
inline IndexVector index_vector(const OptionalTensor& t) { return t ? index_vector(*t) : IndexVector{}; }

// Integers that the checks have read, for a call on the host; empty: not given.
inline IndexVector index_vector(const std::vector<int64_t>& values) {
  return {.data = values.empty() ? nullptr : values.data(), .type = IndexType::i64};
}

// `state` is written in place.
template <class Strides>
Pool<Strides> pool(const Tensor& state, const Strides& strides, const IndexVector& rows) {
  return {.dtype = kernel_dtype(state),
          .P = state.size(0),
          .data = const_cast<void*>(state.const_data_ptr()),
          .strides = strides,
          .rows = rows};
}

}  // namespace jet::bindings
