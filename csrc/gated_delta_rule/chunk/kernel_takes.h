// Which calls the Hopper kernels of the chunked gated delta rule take; the others are served by the plain path.
#pragma once

#include "csrc/gated_delta_rule/chunk/chunk_gated_delta_rule.h"

namespace jet {

inline bool chunk_kernel_takes(const ChunkGatedDeltaRuleParams& p) {
  const bool head = (p.K == 64 || p.K == 96 || p.K == 128 || p.K == 192 || p.K == 256) && p.V % 16 == 0;
  return head && (p.dtype == Dtype::bf16 || p.dtype == Dtype::f16);
}

// Whether the kernels can read q, k or v where it is: by TMA and in 16-byte units. Where not, the caller passes a copy.
inline bool chunk_kernel_reads(const void* data, const TokenStrides& s, int64_t B, int64_t T, int64_t heads) {
  const auto fits = [](int64_t extent, int64_t stride) {
    return extent <= 1 || (stride > 0 && stride % 8 == 0 && stride < (int64_t{1} << 38));
  };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && s.d == 1 && fits(B, s.b) && fits(T, s.t) && fits(heads, s.h);
}

}  // namespace jet
