// Which calls the Hopper kernel of attention_step takes, and how it cuts a sequence.
#pragma once

#include <cstdint>

#include "csrc/attention/attention_step.h"

namespace jet {

constexpr int64_t kAttentionMostQueries = 16;  // of a key head: the rows of an mma

inline bool attention_step_kernel_takes(const AttentionStepParams& p) {
  const auto aligned = [](const AttentionCache& cache) {  // 16-byte accesses
    const AttentionCacheStrides& s = cache.strides;
    return reinterpret_cast<uintptr_t>(cache.data) % 16 == 0 && s.d == 1 && s.l % 8 == 0 && s.h % 8 == 0 &&
           s.n % 8 == 0;
  };
  return (p.dtype == Dtype::bf16 || p.dtype == Dtype::f16) && (p.D == 64 || p.D == 128 || p.D == 256) &&
         p.H <= kAttentionMostQueries * p.Hkv && aligned(p.key) && aligned(p.value);
}

namespace hopper {

constexpr int kAttentionWarps = 4, kAttentionKeys = 16;           // keys of a warp's tile: k of an mma
constexpr int kAttentionTile = kAttentionWarps * kAttentionKeys;  // keys of a CTA at a time
constexpr int64_t kAttentionLeastSplit = 4 * kAttentionTile;      // below, a CTA is over before it has started
constexpr int64_t kAttentionCtasPerMultiprocessor = 4;            // two at a time, so that the last wave is short

// Keys of a CTA. By what the host knows: lengths are on the device, and a full cache is what takes long.
inline int64_t attention_split(int64_t N, int64_t Hkv, int64_t L, int64_t multiprocessors) {
  const int64_t wanted = (kAttentionCtasPerMultiprocessor * multiprocessors + N * Hkv - 1) / (N * Hkv);
  const int64_t keys = (L + wanted - 1) / wanted;
  const int64_t rounded = (keys + kAttentionTile - 1) / kAttentionTile * kAttentionTile;
  return rounded < kAttentionLeastSplit ? kAttentionLeastSplit : rounded;
}

}  // namespace hopper
}  // namespace jet
