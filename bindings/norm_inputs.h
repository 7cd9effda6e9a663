// The arguments of the norms, and what their bindings check and fill in alike.
#pragma once

#include <tuple>

#include "bindings/arguments.h"
#include "bindings/backend.h"
#include "bindings/checks.h"
#include "bindings/launch_scope.h"
#include "bindings/row_tensors.h"
#include "bindings/torch_parallel.h"
#include "csrc/norm/kernel_takes.h"
#include "csrc/norm/rms_norm.h"

namespace jet::bindings {

// x [..., C]. Binds C.
inline void check_rows(Checks& checks, const Tensor& x) {
  checks.rows("x", x);
  checks.floating("x", x);
  checks.bind("C", x.size(-1), "as in ", "x");
}

// weight [C] in the dtype of x or fp32.
inline void check_norm_weight(Checks& checks, const Tensor& weight, const Tensor& x) {
  checks.shape("weight", weight, {"C"});
  checks.dtype_like_or_fp32("weight", weight, "x", x);
  checks.device("weight", weight, "x", x);
}

// The leading dimensions of tensors of one shape [..., C], parted into outer and inner ones so that each part has one
// stride in every tensor. A tensor whose columns are not contiguous, or with others that no parting fits, is copied.
class RowLayout {
 public:
  // `alignment`: bytes of which each row begins at a multiple.
  RowLayout(int64_t alignment, std::initializer_list<Tensor*> tensors)
      : like_(**tensors.begin()), last_(like_.dim() - 1) {
    if (like_.numel() == 0) return;
    for (Tensor* t : tensors)
      if (!has_rows(*t, alignment)) *t = t->is_contiguous() ? torch::stable::clone(*t) : dense(*t);
    while (outer_dims_ <= last_ && !fits(tensors)) ++outer_dims_;
    if (outer_dims_ <= last_) return;
    for (Tensor* t : tensors) *t = dense(*t);
    outer_dims_ = 0;
  }

  NormRows rows(const Tensor& t) const {
    return {.data = t.const_data_ptr(),
            .outer_stride = common_stride(t, 0, outer_dims_).value_or(0),
            .inner_stride = common_stride(t, outer_dims_, last_).value_or(0)};
  }

  NormInputs inputs(const Tensor& weight, double eps) const {
    const int64_t C = like_.size(last_);
    int64_t inner = 1;
    for (int64_t i = outer_dims_; i < last_; ++i) inner *= like_.size(i);
    return {.dtype = kernel_dtype(like_),
            .weight_dtype = kernel_dtype(weight),
            .rows = C == 0 ? 0 : like_.numel() / C,
            .inner = inner,
            .C = C,
            .eps = eps,
            .x = rows(like_),
            .residual = {},
            .gate = {},
            .weight = weight.const_data_ptr()};
  }

 private:
  static bool has_rows(const Tensor& t, int64_t alignment) {
    const int64_t last = t.dim() - 1, elements = alignment / static_cast<int64_t>(t.element_size());
    if (t.stride(last) != 1) return false;
    if (elements <= 1) return true;
    for (int64_t i = 0; i < last; ++i)
      if (t.size(i) > 1 && t.stride(i) % elements != 0) return false;
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % alignment == 0;
  }

  bool fits(std::initializer_list<Tensor*> tensors) const {
    for (const Tensor* t : tensors)
      if (!common_stride(*t, 0, outer_dims_) || !common_stride(*t, outer_dims_, last_)) return false;
    return true;
  }

  const Tensor& like_;  // the first one, x
  int64_t last_, outer_dims_ = 0;
};

// What a kernel reads, on `device`: bytes of which rows must begin at a multiple, and the weight.
inline int64_t row_alignment(int device, const Tensor& x) {
  return device == kHost ? 1 : norm_unit(kernel_dtype(x), x.size(-1)) * static_cast<int64_t>(x.element_size());
}
inline Tensor norm_weight(int device, const Tensor& weight, const Tensor& x) {
  if (device != kHost) return aligned(weight);
  return dense(x.scalar_type() == ScalarType::Double ? in_dtype(weight, ScalarType::Double) : weight);
}

// A gradient as forward's results are: contiguous, on a device aligned.
inline Tensor norm_gradient(int device, const Tensor& grad) { return device == kHost ? dense(grad) : aligned(grad); }

inline bool kernel_takes(const Tensor& x) {
  const int64_t C = x.size(-1);
  return rms_norm_kernel_takes(kernel_dtype(x), C == 0 ? 0 : x.numel() / C, C);
}

inline void run_norm(int device, const RmsNormParams& p, [[maybe_unused]] const Tensor& x) {
  if (p.in.rows == 0) return;
  if (device == kHost)
    rms_norm_cpu(p, torch_parallel());
  else if constexpr (kWithCuda)
    rms_norm_hopper(p, LaunchScope(x).stream());
}

inline void run_norm_backward(int device, const RmsNormBackwardParams& p, [[maybe_unused]] const Tensor& x) {
  if (device == kHost) {
    rms_norm_backward_cpu(p, torch_parallel());
  } else if constexpr (kWithCuda) {
    const LaunchScope scope(x);
    const Tensor workspace = allocate(x, {rms_norm_backward_workspace(p.in)}, ScalarType::Float);
    rms_norm_backward_hopper(p, static_cast<float*>(workspace.mutable_data_ptr()), scope.stream());
  }
}

}  // namespace jet::bindings
