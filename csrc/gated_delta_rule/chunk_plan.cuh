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
  int* first_cut;          // likewise
  int64_t most_chunks;     // of all sequences together
  int segment_chunks;      // sequences of at least twice as many are cut into segments of about as many; 0: none is
  int most_cuts;           // of all sequences together
};

// A sequence: tokens begin .. begin + length - 1 of batch row `row`, chunks first_chunk .. first_chunk + chunks - 1 of all. Its cuts, one
// fewer than its segments, are first_cut .. of all.
struct Sequence {
  int64_t row, begin, length, first_chunk;
  int chunks, segments, first_cut;
};

JET_INDEX_MAP int64_t chunks_of(int64_t tokens) { return (tokens + C - 1) / C; }
JET_INDEX_MAP int segments_of(int64_t chunks, int segment_chunks) {
  return segment_chunks > 0 && chunks >= 2 * segment_chunks ? static_cast<int>(chunks / segment_chunks) : 1;
}
// The chunk of a sequence at which segment s of `segments` begins.
JET_INDEX_MAP int segment_begin(int64_t chunks, int segments, int64_t s) { return static_cast<int>(chunks * s / segments); }

// Offsets outside 0..T, which the contract forbids and a device cannot report, must not become addresses.
__device__ inline int64_t offset_of(const ChunkPlan& plan, int64_t n) {
  return min(max(load_index(plan.cu_seqlens, plan.cu_seqlens_type, n), int64_t{0}), plan.T);
}

__device__ inline Sequence sequence_of(const ChunkPlan& plan, int64_t n) {
  if (plan.cu_seqlens == nullptr) {
    const int64_t chunks = chunks_of(plan.T);
    const int segments = segments_of(chunks, plan.segment_chunks);
    return {n, 0, plan.T, n * chunks, static_cast<int>(chunks), segments, static_cast<int>(n * (segments - 1))};
  }
  const int64_t begin = offset_of(plan, n), end = offset_of(plan, n + 1);
  const int first = plan.first_chunk[n], cut = plan.first_cut[n];
  return {0, begin, max(end - begin, int64_t{0}), first, plan.first_chunk[n + 1] - first, plan.first_cut[n + 1] - cut + 1, cut};
}

// The last n < N with first(n) <= i; first(0) = 0.
template <class First>
__device__ int64_t last_at_most(int64_t N, int64_t i, const First& first) {
  int64_t low = 0, high = N;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first(middle) <= i ? low : high) = middle;
  }
  return low;
}

// The sequence of a chunk; -1 if there are fewer chunks.
__device__ inline int64_t sequence_of_chunk(const ChunkPlan& plan, int64_t chunk) {
  if (plan.cu_seqlens == nullptr) return chunk / chunks_of(plan.T);
  if (chunk >= plan.first_chunk[plan.N]) return -1;
  return last_at_most(plan.N, chunk, [&](int64_t n) { return plan.first_chunk[n]; });
}

// The sequence whose segments a cut separates; -1 if there are fewer cuts.
__device__ inline int64_t sequence_of_cut(const ChunkPlan& plan, int64_t cut) {
  if (plan.cu_seqlens == nullptr) return cut / (segments_of(chunks_of(plan.T), plan.segment_chunks) - 1);
  if (cut >= plan.first_cut[plan.N]) return -1;
  return last_at_most(plan.N, cut, [&](int64_t n) { return plan.first_cut[n]; });
}

// The sequence of a segment, counted over all sequences, each of which has its cuts and one more; -1 if there are fewer.
__device__ inline int64_t sequence_of_segment(const ChunkPlan& plan, int64_t segment) {
  if (plan.cu_seqlens == nullptr) return segment / segments_of(chunks_of(plan.T), plan.segment_chunks);
  if (segment >= plan.N + plan.first_cut[plan.N]) return -1;
  return last_at_most(plan.N, segment, [&](int64_t n) { return n + plan.first_cut[n]; });
}

constexpr int kPlanThreads = 1024;

// x summed over this and the threads before it; `total`: over all. `of_warp` has room for a number per warp.
__device__ inline int64_t sum_of_threads(int64_t x, int64_t* of_warp, int64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int64_t other = __shfl_up_sync(0xffffffffu, x, distance);
    if (lane >= distance) x += other;
  }
  if (lane == 31) of_warp[warp] = x;
  __syncthreads();
  total = 0;
  for (int w = 0; w < kPlanThreads / 32; ++w) {
    if (w < warp) x += of_warp[w];
    total += of_warp[w];
  }
  __syncthreads();
  return x;
}

// first_chunk[n] = chunks, first_cut[n] = cuts of the sequences before n
static __global__ void __launch_bounds__(kPlanThreads) chunk_plan_kernel(const __grid_constant__ ChunkPlan plan) {
  __shared__ int64_t of_warp[kPlanThreads / 32];
  int64_t chunks_before = 0, cuts_before = 0;
  for (int64_t n0 = 0; n0 < plan.N; n0 += kPlanThreads) {
    const int64_t n = n0 + threadIdx.x;
    const int64_t chunks = n < plan.N ? chunks_of(max(offset_of(plan, n + 1) - offset_of(plan, n), int64_t{0})) : 0;
    int64_t all_chunks, all_cuts;
    const int64_t sum = chunks_before + sum_of_threads(chunks, of_warp, all_chunks);
    const int64_t cuts = cuts_before + sum_of_threads(segments_of(chunks, plan.segment_chunks) - 1, of_warp, all_cuts);
    if (n < plan.N) {
      plan.first_chunk[n + 1] = static_cast<int>(min(sum, plan.most_chunks));
      plan.first_cut[n + 1] = static_cast<int>(min(cuts, int64_t{plan.most_cuts}));
    }
    chunks_before += all_chunks, cuts_before += all_cuts;
  }
  if (threadIdx.x == 0) plan.first_chunk[0] = 0, plan.first_cut[0] = 0;
}

}  // namespace jet::hopper
