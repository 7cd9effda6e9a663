// `join`: the states at the cuts of a sequence, one after the other, in fp32. At cut s + 1, behind segment s,
//   S_{s+1} = M_s S_s + N_s
// where sweep has left N_s [K, V] (what segment s makes of zero) and M_s [K, K] (what it makes of the identity, with V = 0); behind the first
// segment it has left the true state. A CTA has the first cut of a sequence, a head and 32 columns; a warp has rows of S, a lane a column.
#pragma once

#include "csrc/gated_delta_rule/chunk_plan.cuh"
#include "csrc/hopper/launch.h"

namespace jet::hopper {

struct JoinArguments {
  ChunkPlan plan;
  int64_t H, V;
  int K;
  float* states;           // [cuts, H, K, V]
  const float* transfers;  // [cuts, H, K, K]
};

constexpr int kJoinThreads = 256, kJoinColumns = 32, kJoinRows = 8;  // of a CTA; rows that a thread sums at a time

// s [K, 32] <- M s + N, N being in `to`, where the sum goes as well. All threads.
__device__ inline void join_step(const JoinArguments& p, float* s, const float* transfer, float* to, int columns) {
  const int lane = threadIdx.x % 32, warps = kJoinThreads / 32;
  float sums[256 / warps / kJoinRows][kJoinRows];
#pragma unroll
  for (int part = 0; part < 256 / warps / kJoinRows; ++part) {
    const int row = (threadIdx.x / 32 + part * warps) * kJoinRows;
    if (row >= p.K) break;
#pragma unroll
    for (int i = 0; i < kJoinRows; ++i) sums[part][i] = lane < columns ? to[(row + i) * p.V + lane] : 0;
    for (int k = 0; k < p.K; k += 4) {
      const float x[4] = {s[k * 32 + lane], s[(k + 1) * 32 + lane], s[(k + 2) * 32 + lane], s[(k + 3) * 32 + lane]};
#pragma unroll
      for (int i = 0; i < kJoinRows; ++i) {
        const float4 m = *reinterpret_cast<const float4*>(transfer + (row + i) * p.K + k);
        sums[part][i] += m.x * x[0] + m.y * x[1] + m.z * x[2] + m.w * x[3];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int part = 0; part < 256 / warps / kJoinRows; ++part) {
    const int row = (threadIdx.x / 32 + part * warps) * kJoinRows;
    if (row >= p.K) break;
#pragma unroll
    for (int i = 0; i < kJoinRows; ++i) {
      s[(row + i) * 32 + lane] = sums[part][i];
      if (lane < columns) to[(row + i) * p.V + lane] = sums[part][i];
    }
  }
  __syncthreads();
}

static __global__ void __launch_bounds__(kJoinThreads) chunk_join_kernel(const __grid_constant__ JoinArguments p) {
  extern __shared__ __align__(16) float s[];  // [K, 32]
  const int tiles = static_cast<int>((p.V + kJoinColumns - 1) / kJoinColumns), column = blockIdx.x % tiles * kJoinColumns;
  const int64_t head = blockIdx.x / tiles, cut = head / p.H, h = head % p.H, n = sequence_of_cut(p.plan, cut);
  if (n < 0) return;
  const Sequence sequence = sequence_of(p.plan, n);
  if (cut != sequence.first_cut) return;
  const int lane = threadIdx.x % 32, columns = static_cast<int>(min(p.V - column, int64_t{kJoinColumns}));
  const auto state = [&](int64_t at) { return p.states + (at * p.H + h) * p.K * p.V + column; };
  for (int k = threadIdx.x / 32; k < p.K; k += kJoinThreads / 32) s[k * 32 + lane] = lane < columns ? state(cut)[k * p.V + lane] : 0;
  __syncthreads();
  for (int i = 1; i < sequence.segments - 1; ++i)
    join_step(p, s, p.transfers + ((cut + i) * p.H + h) * p.K * p.K, state(cut + i), columns);
}

inline void launch_join(const JoinArguments& p, cudaStream_t stream) {
  const int64_t ctas = p.plan.most_cuts * p.H * ((p.V + kJoinColumns - 1) / kJoinColumns);
  launch("chunk_gated_delta_rule", {dim3(static_cast<unsigned>(ctas)), kJoinThreads, p.K * kJoinColumns * 4}, stream, chunk_join_kernel, p);
}

}  // namespace jet::hopper
