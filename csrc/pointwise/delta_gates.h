// The gates of the gated delta rule (arXiv 2412.06464, section 3), per token and head h, with x = a + dt_bias[h]:
//
//   g    = -exp(A_log[h]) softplus(x)      the logarithm of the decay, at most 0
//   beta = sigmoid(b)
//
// softplus(x) = max(x, 0) + log(1 + e^-|x|) for every x: no threshold, no positive exponent.
//
// Backward, sums over the tokens:
//
//   dx   = -dg exp(A_log[h]) sigmoid(x)    da = dx    ddt_bias[h] = sum dx
//   db   = dbeta beta (1 - beta)           dA_log[h] = sum dg g
#pragma once

#include "csrc/common/parallel.h"
#include "csrc/common/tensors.h"

namespace jet {

// "Real" is fp32, or fp64 where a and b are.
struct DeltaGatesInputs {
  Dtype dtype;  // of a and b
  int64_t tokens, H;
  StridedRows a, b;             // [tokens, H]
  const void *A_log, *dt_bias;  // [H] contiguous, real
};

struct DeltaGatesParams {
  DeltaGatesInputs in;
  void *g, *beta;  // [tokens, H] contiguous, real
};

struct DeltaGatesBackwardParams {
  DeltaGatesInputs in;
  StridedRows grad_g, grad_beta;  // [tokens, H] real; the data of grad_beta may be null: zeros
  void *da, *db;                  // [tokens, H] contiguous, in the dtype of a
  void *dA_log, *ddt_bias;        // [H] contiguous, real
};

void delta_gates_cpu(const DeltaGatesParams& params, const Parallel& parallel);
void delta_gates_backward_cpu(const DeltaGatesBackwardParams& params, const Parallel& parallel);

constexpr int64_t kMaxGateHeads = 1024;  // 8 KB of shared memory; a thread each in the backward

inline bool delta_gates_kernel_takes(const DeltaGatesInputs& in) {
  return in.dtype != Dtype::f64 && in.H <= kMaxGateHeads && in.tokens * in.H < int64_t{1} << 31;
}

// On the current CUDA device, of compute capability 9.0, in `stream` (a cudaStream_t). The params must satisfy
// delta_gates_kernel_takes. `workspace`: so many fp32 as delta_gates_backward_workspace says, for the partial sums of
// dA_log and ddt_bias.
void delta_gates_hopper(const DeltaGatesParams& params, void* stream);
int64_t delta_gates_backward_workspace(const DeltaGatesInputs& in);
void delta_gates_backward_hopper(const DeltaGatesBackwardParams& params, float* workspace, void* stream);

}  // namespace jet
