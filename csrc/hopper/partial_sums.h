// Sums over the CTAs of a kernel: each CTA writes its sums to a row of a workspace, a second kernel adds up the rows.
// The order is fixed, so the bits are the same in every run.
#pragma once

#include <cuda_runtime.h>

#include "csrc/common/dtype.h"

namespace jet::hopper {

// outputs[i][c] = sum over the rows of partials[row, i, c]; 0 if there is no row.
struct PartialSums {
  const float* partials;  // [rows, count, columns]
  int rows, count, columns;
  Dtype dtype;       // of the outputs
  void* outputs[2];  // the first `count`, [columns] each
};

// `op` names it in the text of an error.
void add_up(const char* op, const PartialSums& sums, cudaStream_t stream);

}  // namespace jet::hopper
