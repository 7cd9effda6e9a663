// Gradients as operands in the dtype of q.
#pragma once

#include <type_traits>

#include "csrc/common/dtype.h"

namespace jet::hopper {

// What fp16 does not hold as the largest number that it holds; NaN stays. The inverse norm of a row of zeros is 1000
// with l2norm, and what it multiplies then meets that row: infinity times zero would be NaN.
template <class Element>
__device__ float finite_operand(float x) {
  constexpr float most = 65504;
  if constexpr (std::is_same_v<Element, f16>) x = x > most ? most : x < -most ? -most : x;
  return x;
}

}  // namespace jet::hopper
