// Which calls the Hopper kernels of the chunked gated delta rule take; the others are served by the plain path.
#pragma once

#include "csrc/gated_delta_rule/chunk/chunk_gated_delta_rule.h"
#include "csrc/gated_delta_rule/head_dims.h"

namespace jet {

inline bool chunk_kernel_takes(const ChunkGatedDeltaRuleParams& p) {
  const Dtype dtype = p.in.q.dtype;
  return HopperHeadDims::has(p.in.K) && p.in.V % 16 == 0 && (dtype == Dtype::bf16 || dtype == Dtype::f16);
}

// Whether the kernels can read q, k or v [B, T, heads, D] where it is: by TMA and in 16-byte units. Where not, the
// caller passes a copy.
inline bool chunk_kernel_reads(const TokenTensor& x, int64_t B, int64_t T, int64_t heads) {
  const auto fits = [](int64_t extent, int64_t stride) {
    return extent <= 1 || (stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 38));
  };
  const TokenStrides& s = x.strides;
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && s.d == 1 && fits(B, s.b) && fits(T, s.t) && fits(heads, s.h);
}

}  // namespace jet
