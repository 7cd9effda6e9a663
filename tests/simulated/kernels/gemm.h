// C[M, N] = A B^T in fp32 from 16-bit A [M, K] and B [N, K], each with either index contiguous: the first user of
// csrc/hopper. One producer warpgroup (one thread of it issues TMA) and two consumer warpgroups of 64 rows each; a ring
// of stages between them. A cluster of 2 CTAs, neighbours in M, may share the tile of B: each loads half and multicasts
// it.
#pragma once

#include "csrc/hopper/cluster.h"
#include "csrc/hopper/launch.h"
#include "csrc/hopper/pipeline.h"
#include "csrc/hopper/tensor_map.h"
#include "csrc/hopper/tma.h"
#include "csrc/hopper/warp_specialization.h"
#include "csrc/hopper/wgmma.h"
#include "tests/simulated/kernels/operand_tile.h"

namespace jet::hopper::test {

template <class Element_, bool registers_a_, Swizzle swizzle_, Major major_a_, Major major_b_, int cluster_ = 1>
struct GemmConfig {
  using Element = Element_;
  static constexpr bool registers_a = registers_a_;  // A through ldmatrix and registers, or by descriptor
  static constexpr Swizzle swizzle = swizzle_;
  static constexpr Major major_a = major_a_, major_b = major_b_;
  static constexpr int cluster = cluster_;
  static constexpr int M = 128, N = 128, K = 64;  // tile of a CTA, and of a stage
  static constexpr int stages = 3;
  static constexpr int consumers = 2;  // warpgroups
  static constexpr int threads = kWarpgroup * (1 + consumers);
  using TileA = OperandTile<Element, swizzle, major_a, M, K>;
  using TileB = OperandTile<Element, swizzle, major_b, N, K>;
  using Mma = Wgmma<Element, N, major_a, major_b>;
  static_assert(cluster == 1 || (cluster == 2 && major_b == Major::k && TileB::panels == 1),
                "multicast halves one panel");
};

template <class Config>
struct GemmShared {
  struct Stage {
    alignas(kTileAlign) char a[Config::TileA::bytes];
    alignas(kTileAlign) char b[Config::TileB::bytes];
  };
  Stage stage[Config::stages];
  Ring<Config::stages> ring;
  static constexpr int stage_bytes = Config::TileA::bytes + Config::TileB::bytes;
};

struct GemmArguments {
  float* c;
  int m, n, k;
  int64_t row_stride;  // of c, elements
};

// Coordinates (contiguous, row) of an operand's tile.
template <class Tile>
__device__ void load_operand(char* shared, const CUtensorMap& map, Mbarrier& full, int mn, int k) {
  if constexpr (Tile::major == Major::k)
    tma_load_tile<Tile>(shared, map, full, CacheHint::evict_normal, k, mn);
  else
    tma_load_tile<Tile>(shared, map, full, CacheHint::evict_normal, mn, k);
}

template <class Config>
__device__ void produce(GemmShared<Config>& shared, const CUtensorMap& map_a, const CUtensorMap& map_b, int steps) {
  using TileB = typename Config::TileB;
  Producer<Config::stages> ring(shared.ring);
  const int m0 = blockIdx.x * Config::M, n0 = blockIdx.y * Config::N;
  for (int step = 0; step < steps; ++step, ring.advance()) {
    const int k0 = step * Config::K;
    auto& stage = shared.stage[ring.acquire(GemmShared<Config>::stage_bytes)];
    load_operand<typename Config::TileA>(stage.a, map_a, ring.full(), m0, k0);
    if constexpr (Config::cluster == 1) {
      load_operand<TileB>(stage.b, map_b, ring.full(), n0, k0);
    } else {
      const int half = Config::N / 2 * cluster_rank();
      tma_load_multicast(stage.b + half * TileB::row_bytes, map_b, ring.full(), 0b11, CacheHint::evict_normal, k0,
                         n0 + half);
    }
  }
}

template <class Config>
__device__ void multiply(float (&c)[Config::Mma::registers], const typename GemmShared<Config>::Stage& stage, int m,
                         int thread, bool accumulate) {
  using Mma = typename Config::Mma;
  const MatrixDescriptor<typename Config::TileB> b(stage.b);
  if constexpr (Config::registers_a) {
    uint32_t a[Config::K / Mma::K][4];
#pragma unroll
    for (int s = 0; s < Config::K / Mma::K; ++s)
      ldmatrix_a<typename Config::TileA>(a[s], stage.a, thread, m, s * Mma::K);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < Config::K / Mma::K; ++s)
      Mma::rs(c, a[s], b.at(0, s * Mma::K), accumulate || s > 0);  // C += A Bᵀ   [64, N], k16
  } else {
    const MatrixDescriptor<typename Config::TileA> a(stage.a);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < Config::K / Mma::K; ++s)
      Mma::ss(c, a.at(m, s * Mma::K), b.at(0, s * Mma::K), accumulate || s > 0);  // C += A Bᵀ   [64, N], k16
  }
  wgmma_commit_group();
}

template <class Config>
__device__ void consume(GemmShared<Config>& shared, const GemmArguments& p, int steps) {
  const int thread = threadIdx.x % kWarpgroup, m = (threadIdx.x / kWarpgroup - 1) * Config::Mma::M;
  Consumer<Config::stages> ring(shared.ring);
  typename Config::Mma::Accumulator c;
  int previous = 0;
  for (int step = 0; step < steps; ++step, ring.advance()) {
    const int stage = ring.wait();
    multiply<Config>(c, shared.stage[stage], m, thread, step > 0);
    // One group stays in flight, so the stage before this one is free. Register operands are reloaded: none may be in
    // flight.
    if constexpr (Config::registers_a) {
      wgmma_wait_group<0>();
      ring.template release_all<Config::cluster>(stage, thread);
    } else if (step > 0) {
      wgmma_wait_group<1>();
      ring.template release_all<Config::cluster>(previous, thread);
    }
    previous = stage;
  }
  wgmma_wait_group<0>();
  wgmma_fence_operand(c);
#pragma unroll
  for (int r = 0; r < Config::Mma::registers; r += 2) {
    const int row = blockIdx.x * Config::M + m + accumulator_row(thread, r),
              column = blockIdx.y * Config::N + accumulator_column(thread, r);
    if (row >= p.m || column >= p.n) continue;
    float* out = p.c + row * p.row_stride + column;
    out[0] = c[r];
    if (column + 1 < p.n) out[1] = c[r + 1];
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1)
    gemm(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b, const GemmArguments p) {
  extern __shared__ __align__(kTileAlign) char memory[];
  auto& shared = *reinterpret_cast<GemmShared<Config>*>(memory);
  if (threadIdx.x == 0) {
    shared.ring.init(Config::consumers * Config::cluster);
    fence_mbarrier_init();
  }
  if constexpr (Config::cluster > 1)
    cluster_sync();
  else
    __syncthreads();
  const int steps = (p.k + Config::K - 1) / Config::K;
  if (warp_index() < kWarpgroup / 32) {
    setmaxnreg_dec<40>();
    if (warp_index() == 0 && elect_one()) produce<Config>(shared, map_a, map_b, steps);
  } else {
    setmaxnreg_inc<232>();
    consume<Config>(shared, p, steps);
  }
  __syncwarp();
  // A CTA must not exit while its peer may still write to its shared memory or arrive on its barriers.
  if constexpr (Config::cluster > 1) cluster_sync();
}

// Operands as in the file's first lines; strides are those of the non-contiguous index, in elements.
struct GemmProblem {
  const void *a, *b;
  float* c;
  int m, n, k;
  int64_t stride_a, stride_b, stride_c;
};

template <class Config>
void run_gemm(const GemmProblem& p, cudaStream_t stream) {
  using TileA = typename Config::TileA;
  using TileB = typename Config::TileB;
  constexpr Dtype dtype = std::is_same_v<typename Config::Element, bf16> ? Dtype::bf16 : Dtype::f16;
  constexpr bool a_rows_are_k = Config::major_a == Major::mn, b_rows_are_k = Config::major_b == Major::mn;
  const CUtensorMap map_a =
      make_operand_map<TileA>("A", p.a, dtype, a_rows_are_k ? p.k : p.m, a_rows_are_k ? p.m : p.k, p.stride_a);
  const CUtensorMap map_b = make_operand_map<TileB>("B", p.b, dtype, b_rows_are_k ? p.k : p.n, b_rows_are_k ? p.n : p.k,
                                                    p.stride_b, TileB::rows / Config::cluster);
  const unsigned tiles_m = (p.m + Config::M - 1) / Config::M, tiles_n = (p.n + Config::N - 1) / Config::N;
  const unsigned grid_m = (tiles_m + Config::cluster - 1) / Config::cluster * Config::cluster;
  launch("gemm", {dim3(grid_m, tiles_n), Config::threads, sizeof(GemmShared<Config>), Config::cluster}, stream,
         gemm<Config>, map_a, map_b, GemmArguments{p.c, p.m, p.n, p.k, p.stride_c});
}

}  // namespace jet::hopper::test
