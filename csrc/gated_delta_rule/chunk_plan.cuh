// Which sequence has which tokens and chunks. With cu_seqlens only the device knows: the host launches for as many chunks as there can be.
#pragma once

#include "csrc/gated_delta_rule/chunk_image.h"
#include "csrc/hopper/convert.h"

namespace jet::hopper {

struct ChunkPlan {
  int64_t T, N;
  const void* cu_seqlens;  // [N + 1]; null: N rows of T tokens
  IndexType cu_seqlens_type;
  int* first_chunk;        // [N + 1] in the workspace, written by chunk_plan_kernel; null without cu_seqlens
  int64_t most_chunks;     // of all sequences together
};

// A sequence: tokens begin .. begin + length - 1 of batch row `row`, chunks first_chunk .. first_chunk + chunks - 1 of all.
struct Sequence {
  int64_t row, begin, length, first_chunk;
  int chunks;
};

JET_INDEX_MAP int64_t chunks_of(int64_t tokens) { return (tokens + C - 1) / C; }

// Offsets outside 0..T, which the contract forbids and a device cannot report, must not become addresses.
__device__ inline int64_t offset_of(const ChunkPlan& plan, int64_t n) {
  return min(max(load_index(plan.cu_seqlens, plan.cu_seqlens_type, n), int64_t{0}), plan.T);
}

__device__ inline Sequence sequence_of(const ChunkPlan& plan, int64_t n) {
  if (plan.cu_seqlens == nullptr) {
    const int64_t chunks = chunks_of(plan.T);
    return {n, 0, plan.T, n * chunks, static_cast<int>(chunks)};
  }
  const int64_t begin = offset_of(plan, n), end = offset_of(plan, n + 1);
  const int first = plan.first_chunk[n];
  return {0, begin, max(end - begin, int64_t{0}), first, plan.first_chunk[n + 1] - first};
}

// The sequence of a chunk; -1 if there are fewer chunks.
__device__ inline int64_t sequence_of_chunk(const ChunkPlan& plan, int64_t chunk) {
  if (plan.cu_seqlens == nullptr) return chunk / chunks_of(plan.T);
  if (chunk >= plan.first_chunk[plan.N]) return -1;
  int64_t low = 0, high = plan.N;  // first_chunk[low] <= chunk < first_chunk[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (plan.first_chunk[middle] <= chunk ? low : high) = middle;
  }
  return low;
}

constexpr int kPlanThreads = 1024;

// first_chunk[n] = chunks of the sequences before n
static __global__ void __launch_bounds__(kPlanThreads) chunk_plan_kernel(const __grid_constant__ ChunkPlan plan) {
  __shared__ int64_t of_warp[kPlanThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t before = 0;
  for (int64_t n0 = 0; n0 < plan.N; n0 += kPlanThreads) {
    const int64_t n = n0 + threadIdx.x;
    int64_t sum = n < plan.N ? chunks_of(max(offset_of(plan, n + 1) - offset_of(plan, n), int64_t{0})) : 0;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, sum, distance);
      if (lane >= distance) sum += other;
    }
    if (lane == 31) of_warp[warp] = sum;
    __syncthreads();
    int64_t total = 0;
    for (int w = 0; w < kPlanThreads / 32; ++w) {
      if (w < warp) sum += of_warp[w];
      total += of_warp[w];
    }
    __syncthreads();
    if (n < plan.N) plan.first_chunk[n + 1] = static_cast<int>(min(before + sum, plan.most_chunks));
    before += total;
  }
  if (threadIdx.x == 0) plan.first_chunk[0] = 0;
}

}  // namespace jet::hopper
