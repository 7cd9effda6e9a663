// `join`: the states at the cuts of a sequence, one after the other, in fp32. At cut s + 1, behind segment s,
//   S_{s+1} = M_s S_s + N_s
// where sweep has left N_s [K, V] (what segment s makes of zero) and M_s [K, K] (what it makes of the identity, with V
// = 0); behind the first segment it has left the true state.
//
// A CTA has a sequence that is cut, a head and 16 columns, and S in shared memory. M does not depend on S: slabs of 32
// of its columns are loaded two ahead. Of a slab, each of eight warps has 8 columns of S and a quarter of the 32
// products of each sum: a lane has rows lane, lane + 32, .. of M, which lie in different banks, and all lanes read the
// same of S. The four partial sums meet in shared memory.
#pragma once

#include "csrc/gated_delta_rule/chunk/plan.cuh"
#include "csrc/hopper/device.h"
#include "csrc/hopper/launch.h"
#include "csrc/hopper/pipeline.h"
#include "csrc/hopper/tensor_map.h"
#include "csrc/hopper/tma.h"

namespace jet::hopper {

template <int K_>
struct JoinConfig {
  static constexpr int K = K_;
  static constexpr int columns = 16, warps = 8;
  static constexpr int warp_columns = 8, shares = warps / (columns / warp_columns);  // shares of the products of a sum
  static constexpr int rows = K / 32;                                                // of a lane
  static constexpr int threads = 32 * warps;
  static constexpr int stages = 3;               // slabs
  static constexpr int ctas = K <= 128 ? 2 : 1;  // per multiprocessor: what fits
  using Slab = OperandTile<float, Swizzle::b128, Major::k, K, 32>;
  static constexpr int state_stride = K + 4, sum_stride = columns + 4;  // in different banks, 16-byte aligned
};

template <class Config>
struct JoinShared {
  alignas(kTileAlign) char slab[Config::stages][Config::Slab::bytes];  // (row, column) of M
  alignas(16) float state[Config::columns][Config::state_stride];      // (column, row) of S
  float sums[Config::shares][Config::K][Config::sum_stride];
  Ring<Config::stages> ring;
};

// The slabs of a head's matrices M, one after the other; one thread.
template <class Config>
struct SlabLoader {
  JoinShared<Config>& shared;
  const CUtensorMap& transfers;
  int row, row_step, left;  // row of the next slab's first row; from a matrix to the next; slabs
  Producer<Config::stages> ring{shared.ring};
  int column = 0;

  __device__ void next() {
    if (left-- <= 0) return;
    const int stage = ring.acquire(Config::Slab::bytes);
    tma_load(shared.slab[stage], transfers, ring.full(), CacheHint::evict_normal, column, row);
    ring.advance();
    column += Config::Slab::panel_width;
    if (column == Config::K) column = 0, row += row_step;
  }
};

// A share of M S for the warp's columns, into `sums`.
template <class Config>
__device__ void multiply_transfer(JoinShared<Config>& shared, SlabLoader<Config>& loader,
                                  Consumer<Config::stages>& ring) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = warp % 2 * Config::warp_columns,
            share = warp / 2;
  constexpr int width = Config::Slab::panel_width / Config::shares;
  float sums[Config::rows][Config::warp_columns] = {};
#pragma unroll 1
  for (int begin = 0; begin < Config::K; begin += Config::Slab::panel_width, ring.advance()) {
    if (threadIdx.x == 0) loader.next();
    __syncwarp();
    const int stage = ring.wait();
#pragma unroll
    for (int k = 0; k < width; k += 4) {
      float4 x[Config::warp_columns];
#pragma unroll
      for (int c = 0; c < Config::warp_columns; ++c)
        x[c] = *reinterpret_cast<const float4*>(&shared.state[column + c][begin + share * width + k]);
#pragma unroll
      for (int r = 0; r < Config::rows; ++r) {
        const float4 m = *reinterpret_cast<const float4*>(
            shared.slab[stage] + Config::Slab::offset(lane, share * width + k) + 32 * r * Config::Slab::row_bytes);
#pragma unroll
        for (int c = 0; c < Config::warp_columns; ++c) {
          float& sum = sums[r][c];
          sum += m.x * x[c].x, sum += m.y * x[c].y, sum += m.z * x[c].z, sum += m.w * x[c].w;
        }
      }
    }
    __syncwarp();
    if (lane == 0) ring.release(stage);
  }
#pragma unroll
  for (int r = 0; r < Config::rows; ++r)
#pragma unroll
    for (int c = 0; c < Config::warp_columns; c += 4)
      st_shared_v4(&shared.sums[share][lane + 32 * r][column + c], sums[r][c], sums[r][c + 1], sums[r][c + 2],
                   sums[r][c + 3]);
}

// A thread of the eight warps has 4 columns of rows threadIdx.x / 4, + 64, .. of the state.
template <class Config, class Body>
__device__ void for_each_four(const Body& body) {
#pragma unroll
  for (int i = 0; i < (Config::K + 63) / 64; ++i) {
    const int row = threadIdx.x / 4 + 64 * i;
    if (row < Config::K) body(i, row, threadIdx.x % 4 * 4);
  }
}

template <class Config>
__device__ void put_state(JoinShared<Config>& shared, int row, int column, float4 x) {
  const float values[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int c = 0; c < 4; ++c) shared.state[column + c][row] = values[c];
}

// State and N of cut i are [K, 16] with rows V apart; N is where the state goes.
template <class Config, class StateAt>
__device__ void join_states(JoinShared<Config>& shared, SlabLoader<Config>& loader, int64_t V, int steps,
                            const StateAt& state_at) {
  const auto at = [&](float* state, int row, int column) {
    return reinterpret_cast<float4*>(state + row * V + column);
  };
  for_each_four<Config>(
      [&](int, int row, int column) { put_state(shared, row, column, *at(state_at(0), row, column)); });
  __syncthreads();
  Consumer<Config::stages> ring(shared.ring);
  for (int i = 1; i <= steps; ++i) {
    float* const state = state_at(i);
    float4 x[(Config::K + 63) / 64];
    for_each_four<Config>([&](int at_i, int row, int column) { x[at_i] = *at(state, row, column); });  // N, early
    multiply_transfer<Config>(shared, loader, ring);
    __syncthreads();
    for_each_four<Config>([&](int at_i, int row, int column) {
      float4 sum = x[at_i];
#pragma unroll
      for (const auto& of_share : shared.sums) {
        const float4 part = *reinterpret_cast<const float4*>(&of_share[row][column]);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
      __stcg(at(state, row, column), sum);
      put_state(shared, row, column, sum);
    });
    __syncthreads();
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::ctas)
    chunk_join_kernel(const __grid_constant__ JoinArguments p, const __grid_constant__ CUtensorMap transfers) {
  extern __shared__ __align__(kTileAlign) char memory[];
  auto& shared = *reinterpret_cast<JoinShared<Config>*>(memory);
  griddepcontrol_launch_dependents();
  if (threadIdx.x == 0) {
    prefetch_tensormap(transfers);
    shared.ring.init(Config::warps);
    fence_mbarrier_init();
  }
  __syncthreads();
  griddepcontrol_wait();
  const uint32_t tiles = static_cast<uint32_t>(p.V) / Config::columns, H = static_cast<uint32_t>(p.H);
  const uint32_t column = blockIdx.x % tiles * Config::columns, head = blockIdx.x / tiles, h = head % H;
  const bool packed = p.plan.cu_seqlens.data != nullptr;
  const int64_t n = packed ? sequence_of_cut(p.plan, head / H) : head / H;
  if (n < 0) return;
  const Sequence sequence = sequence_of(p.plan, n);
  if (packed && head / H != sequence.first_cut) return;
  const int steps = sequence.segments - 2;
  const int64_t first = int64_t{sequence.first_cut} * p.H + h;
  SlabLoader<Config> loader{.shared = shared,
                            .transfers = transfers,
                            .row = static_cast<int>((first + (p.reverse ? steps : 1) * p.H) * Config::K),
                            .row_step = static_cast<int>(p.reverse ? -p.H : p.H) * Config::K,
                            .left = steps * Config::K / Config::Slab::panel_width};
  if (threadIdx.x == 0)
    for (int s = 0; s < Config::stages - 1; ++s) loader.next();
  join_states<Config>(shared, loader, p.V, steps, [&](int i) {
    return p.states + (first + (p.reverse ? steps - i : i) * p.H) * Config::K * p.V + column;
  });
}

template <int K>
void launch_join_kernel(const JoinArguments& p, cudaStream_t stream) {
  using Config = JoinConfig<K>;
  static_assert(ctas_fit(sizeof(JoinShared<Config>), Config::ctas));
  const bool packed = p.plan.cu_seqlens.data != nullptr;
  const int64_t ctas = (packed ? p.plan.most_cuts : p.plan.N) * p.H * (p.V / Config::columns);
  const CUtensorMap transfers =
      make_operand_map<typename Config::Slab>("transfers", p.transfers, Dtype::f32, p.plan.most_cuts * p.H * K, K, K);
  launch(kChunkOp,
         {.grid = dim3(static_cast<unsigned>(ctas)),
          .threads = Config::threads,
          .shared_bytes = static_cast<int>(sizeof(JoinShared<Config>)),
          .programmatic = true},
         stream, chunk_join_kernel<Config>, p, transfers);
}

}  // namespace jet::hopper
