// `plan`: where the chunks and cuts of each sequence begin, from cu_seqlens. One CTA.
#pragma once

#include "csrc/gated_delta_rule/chunk/plan.cuh"
#include "csrc/hopper/launch.h"

namespace jet::hopper {

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

// The chunk behind which mark m lies, -1 if none: it is not behind a whole chunk, nor at the end of a sequence, or its
// sequence has no row.
__device__ inline int64_t chunk_of_mark(const ChunkPlan& plan, const PrefillStates& states, int64_t m) {
  const int64_t token = load_index(states.mark_tokens, m);
  if (token < 1 || token > plan.T) return -1;
  const int64_t n = last_at_most(plan.N, token - 1, [&](int64_t i) { return offset_of(plan, i); });
  const int64_t local = token - offset_of(plan, n), length = offset_of(plan, n + 1) - offset_of(plan, n);
  if (row_of(states.pool, n) < 0 || local > length || (local % C != 0 && local != length)) return -1;
  const int64_t chunk = plan.first_chunk[n] + (local - 1) / C;
  return chunk < plan.most_chunks ? chunk : -1;
}

// first_chunk[n] = chunks, first_cut[n] = cuts of the sequences before n; marks
static __global__ void __launch_bounds__(kPlanThreads)
    chunk_plan_kernel(const __grid_constant__ ChunkPlan plan, const __grid_constant__ PrefillStates states) {
  __shared__ int64_t of_warp[kPlanThreads / 32];
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
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
  if (plan.marks == nullptr) return;
  for (int64_t i = threadIdx.x; i < plan.most_chunks; i += kPlanThreads) plan.marks[i] = -1;
  __syncthreads();
  for (int64_t m = threadIdx.x; m < states.M; m += kPlanThreads) {
    const int64_t row = load_index(states.mark_rows, m);
    if (row < 0 || row >= states.pool.P) continue;
    const int64_t chunk = chunk_of_mark(plan, states, m);
    if (chunk >= 0) plan.marks[chunk] = static_cast<int>(row);
  }
}

}  // namespace jet::hopper
