// SwiGLU, the gated activation of an MLP (arXiv 2002.05202), with s = sigmoid(gate):
//
//   y     = silu(gate) up = gate s up
//
// Backward:
//
//   dgate = dy up s (1 + gate (1 - s))
//   dup   = dy gate s
#pragma once

#include "csrc/common/parallel.h"
#include "csrc/common/tensors.h"

namespace jet {

struct SwigluParams {
  Dtype dtype;
  int64_t rows, C;
  StridedRows gate, up;  // [rows, C]
  void* y;               // [rows, C] contiguous
};

struct SwigluBackwardParams {
  Dtype dtype;
  int64_t rows, C;
  StridedRows grad_y, gate, up;  // [rows, C]
  void *dgate, *dup;             // [rows, C] contiguous
};

void swiglu_cpu(const SwigluParams& params, const Parallel& parallel);
void swiglu_backward_cpu(const SwigluBackwardParams& params, const Parallel& parallel);

inline bool swiglu_kernel_takes(Dtype dtype) { return dtype != Dtype::f64; }

// On the current CUDA device, of compute capability 9.0, in `stream` (a cudaStream_t).
void swiglu_hopper(const SwigluParams& params, void* stream);
void swiglu_backward_hopper(const SwigluBackwardParams& params, void* stream);

}  // namespace jet
