// Which calls the Hopper kernels of the norms take; the others are served by the plain path. They take rows in units:
// 16 bytes, of which each row begins at a multiple, or single elements where C is no multiple of 16 bytes.
#pragma once

#include "csrc/norm/rms_norm.h"

namespace jet {

constexpr int kNormThreads = 1024;  // of a CTA, at most

// Elements of a unit.
constexpr int64_t norm_unit(Dtype dtype, int64_t C) {
  const int64_t unit = dtype == Dtype::f32 ? 4 : 8;
  return C % unit == 0 ? unit : 1;
}

// Units that a thread holds of a row. One, so that a row of a decode step is read as fast as memory answers; single
// elements are few bytes.
constexpr int units_of_lane(int64_t unit) { return unit == 1 ? 8 : 1; }

// The same of the backward, whose CTAs have half the threads: a thread then has 128 registers.
constexpr int kNormBackwardThreads = kNormThreads / 2;
constexpr int units_of_backward_lane(int64_t unit) { return 2 * units_of_lane(unit); }

// Of forward and backward.
constexpr bool rms_norm_kernel_takes(Dtype dtype, int64_t rows, int64_t C) {
  const int64_t unit = norm_unit(dtype, C);
  return dtype != Dtype::f64 && rows < int64_t{1} << 31 && C <= kNormThreads * unit * units_of_lane(unit);
}

}  // namespace jet
