// RMS norms over the last dimension, alone and with what stands beside them in a model. Of each row [C], with
// r(z) = 1 / sqrt(mean_c z[c]^2 + eps):
//
//   rms_norm         y = x r(x) weight
//   add_rms_norm     sum = x + residual, rounded to the dtype;  y = sum r(sum) weight
//   gated_rms_norm   y = x r(x) weight silu(gate)
//
// Backward, with s = silu(gate) or 1, z = sum or x, r = r(z), u = dy weight s:
//
//   dz = r (u - z r^2 mean_c(u z)) + dsum         dx = dresidual = dz
//   dgate = dy z r weight silu'(gate)             dweight = sum over the rows of dy z r s
//
// Arithmetic is fp32 (fp64 of fp64), results are rounded once. A row's results do not depend on the other rows.
#pragma once

#include <cstdint>

#include "csrc/common/dtype.h"
#include "csrc/common/parallel.h"

namespace jet {

// Rows [C] of contiguous elements: row number r begins at data + (r / inner) outer_stride + (r % inner) inner_stride,
// in elements; `inner` is that of the call. So heads [N, T, H, V] that are columns of a wider tensor are rows.
struct NormRows {
  const void* data = nullptr;  // null: not given
  int64_t outer_stride = 0, inner_stride = 0;
};

// What forward and backward read. At most one of residual and gate is given.
struct NormInputs {
  Dtype dtype;         // of x, residual and gate, and of y and sum
  Dtype weight_dtype;  // the same, or f32 beside bf16 and f16
  int64_t rows, inner, C;
  double eps;
  NormRows x, residual, gate;
  const void* weight;  // [C] contiguous
};

struct RmsNormParams {
  NormInputs in;
  void* y;    // [rows, C] contiguous
  void* sum;  // [rows, C] contiguous; with a residual
};

struct RmsNormBackwardParams {
  NormInputs in;
  const void* grad_y;    // [rows, C] contiguous; on a device 16-byte aligned
  const void* grad_sum;  // [rows, C] alike, or null: zeros
  void* dx;              // [rows, C] contiguous
  void* dresidual;       // [rows, C] contiguous; with a residual
  void* dgate;           // [rows, C] contiguous; with a gate
  void* dweight;         // [C], in weight_dtype
};

void rms_norm_cpu(const RmsNormParams& params, const Parallel& parallel);
void rms_norm_backward_cpu(const RmsNormBackwardParams& params, const Parallel& parallel);

// On the current CUDA device, of compute capability 9.0, in `stream` (a cudaStream_t). The params must satisfy
// rms_norm_kernel_takes (kernel_takes.h). `workspace`: so many fp32 as rms_norm_backward_workspace says, for the
// partial sums of dweight.
void rms_norm_hopper(const RmsNormParams& params, void* stream);
int64_t rms_norm_backward_workspace(const NormInputs& in);
void rms_norm_backward_hopper(const RmsNormBackwardParams& params, float* workspace, void* stream);

}  // namespace jet
