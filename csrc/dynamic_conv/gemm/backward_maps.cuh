// Tensor maps of the backward's passes, and the choice of an instance.
#pragma once

#include "csrc/dynamic_conv/gemm/backward_launch.h"
#include "csrc/dynamic_conv/window.cuh"
#include "csrc/hopper/tensor_map.h"

namespace jet::hopper {

// The map of a matrix [rows, columns] of 16-bit elements, for boxes [box_rows, box_columns] of which every `step`-th
// row is copied. One row's stride means nothing to its tensor, but a tensor map checks it.
inline CUtensorMap matrix_map(const char* name, const void* data, Dtype dtype, int64_t rows, int64_t columns,
                              int64_t row_stride, int box_rows, int box_columns, Swizzle swizzle, int step = 1) {
  const auto stride = static_cast<uint64_t>(rows == 1 ? columns : row_stride);
  return make_tensor_map({.name = name,
                          .data = data,
                          .dtype = dtype,
                          .rank = 2,
                          .extent = {static_cast<uint64_t>(columns), static_cast<uint64_t>(rows)},
                          .stride_bytes = {0, stride * 2},
                          .box = {static_cast<uint32_t>(box_columns), static_cast<uint32_t>(box_rows)},
                          .swizzle = swizzle,
                          .step = {1, static_cast<uint32_t>(step)}});
}

// The map of the weight [D*W, R] whose boxes [box_j * 8 W, 64] have the rows in the order of a tile's columns
// (tile.cuh, with 8 channels a thread).
inline CUtensorMap weight_map(const DynamicConvBackwardParams& p, int box_j) {
  const uint64_t W = p.in.W, row = p.generator.R * 2;
  constexpr uint64_t P = 8;
  return make_tensor_map({
      .name = "weight",
      .data = p.generator.weight,
      .dtype = p.in.x.dtype,
      .rank = 5,  // r, e, c, w, j
      .extent = {static_cast<uint64_t>(p.generator.R), 2, p.in.D / P, W, P / 2},
      .stride_bytes = {0, W * row, P * W * row, row, 2 * W * row},
      .box = {64, 2, 4, static_cast<uint32_t>(W), static_cast<uint32_t>(box_j)},
      .swizzle = Swizzle::b128,
  });
}

// f(Element(), integral_constant W, integral_constant N) for a call, with N = columns (backward_workspace.h).
template <class F>
void with_gradient_columns(const DynamicConvBackwardParams& p, int columns, const F& f) {
  with_element_and_taps(p.in, [&](auto element, auto taps) {
    if constexpr (taps != 4)
      f(element, taps, std::integral_constant<int, 128>());
    else if (columns == 64)
      f(element, taps, std::integral_constant<int, 64>());
    else if (columns == 192)
      f(element, taps, std::integral_constant<int, 192>());
    else
      f(element, taps, std::integral_constant<int, 256>());
  });
}

}  // namespace jet::hopper
