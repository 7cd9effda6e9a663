// All of a JetBlock's decode step between its input and its output projections: a token for each of N sequences, whose
// two states are rows of pools and are advanced in place. Per sequence n and head h, with r = rows[n]:
//
//   v'   = silu(convolution step of v on conv pool[r], taps from silu(hidden))      dynamic_conv_step.h; rounded to the
//                                                                                   dtype of v, as silu(hidden) is
//   g    = -exp(A_log[h]) softplus(a[n,h] + dt_bias[h])     beta = sigmoid(b[n,h])
//   o    = scale times the gated delta rule's output of silu(q), silu(k), v', g, beta on state pool[r, h], with l2norm
//                                                                                   recurrent_gated_delta_rule.h
//   y    = o / sqrt(mean o^2 + eps) norm_weight silu(gate)
//
// A negative r touches no state and gives y[n,:] = 0.
#pragma once

#include "csrc/common/parallel.h"
#include "csrc/dynamic_conv/step/dynamic_conv_step.h"
#include "csrc/gated_delta_rule/recurrent/recurrent_gated_delta_rule.h"

namespace jet {

struct JetBlockStepParams {
  DynamicConvStepParams conv;  // of v [N, H*V], with silu. On a CPU y is null: v' has no memory of its own
  // With l2norm_qk. q, k [N, 1, H, K] are those before SiLU; g and beta [N, 1, H] are a and b, of any dtype; v is not
  // set. o: [N, H, V] fp32, on a CPU null.
  RecurrentGatedDeltaRuleParams recurrent;
  GateParameters gates;
  TokenTensor gate;          // [N, 1, H, V], dtype of q
  NumberVector norm_weight;  // [V]
  double eps;
  void* y;  // [N, H*V] dtype of q, contiguous
};

// May throw std::bad_alloc, before anything is written.
void jet_block_step_cpu(const JetBlockStepParams& params, const Parallel& parallel);

// On the current CUDA device, of compute capability 9.0, in `stream` (a cudaStream_t): three launches. The params must
// satisfy jet_block_step_kernel_takes.
void jet_block_step_hopper(const JetBlockStepParams& params, void* stream);

}  // namespace jet
