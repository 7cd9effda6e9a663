// Products with a weight that is streamed from memory once for all rows of x, as a decode step needs them.
//
//   y = x W^T + bias     x [N, C]   W [P, C]   bias [P]   y [N, P]
//
// linear:       W in the dtype of x
// linear_int8:  W(p, c) = scale(p, g) weight(p, c)           g = c / (C / G), the group of column c
// linear_int4:  W(p, c) = scale(p, g) (half of a byte - 8)   byte c / 2 of a row: even c in its low half, odd c in its
//               high half; groups have an even number of columns
//
// Products are summed in fp32 (fp64 for fp64), a scale multiplies the sum of its group, and y is rounded once. A row of
// y depends on that row of x alone, and not on the number of threads.
#pragma once

#include "csrc/common/dtype.h"
#include "csrc/common/parallel.h"

namespace jet {

struct LinearParams {
  Dtype dtype;  // of x, bias and y
  int64_t N, C, P, G;
  const void* x;  // element (n, c) at n * x_row + c * x_column
  int64_t x_row, x_column;
  const void* weight;  // rows of unit stride
  int64_t weight_row;  // elements from one to the next; bytes of int4
  const float* scale;  // [P, G] contiguous; null for `linear`, whose G is 1
  const void* bias;    // [P] contiguous, or null
  void* y;             // [N, P] contiguous
};

void linear_cpu(const LinearParams& params, const Parallel& parallel);
void linear_int8_cpu(const LinearParams& params, const Parallel& parallel);
void linear_int4_cpu(const LinearParams& params, const Parallel& parallel);

}  // namespace jet
