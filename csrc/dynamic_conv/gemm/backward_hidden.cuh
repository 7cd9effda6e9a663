// Backward, second pass: dhidden [tokens, R] = dtaps weight, where dtaps[t, (d, w)] = dz[t, d] x[t - (W-1) + w, d] is
// made in registers, as the A operand of wgmma, from dz and x in shared memory.
//
// A CTA has 128 tokens and N columns of R, and walks over tiles of 32 channels. The columns of dtaps are permuted as
// those of a tile of taps (tile.cuh), so that a thread has all taps of 8 consecutive channels; the rows of the
// weight, which are the B operand as they lie in memory (MN-major), are permuted alike by their tensor map. The cluster
// is 2 CTAs, neighbours in tokens, that share the weights.
#pragma once

#include "csrc/dynamic_conv/gemm/backward_places.cuh"
#include "csrc/dynamic_conv/gemm/tile.cuh"
#include "csrc/hopper/cluster.h"
#include "csrc/hopper/warp_specialization.h"

namespace jet::hopper {

struct HiddenGradientArguments {
  ConvSequences sequences;
  ConvStates states;
  int64_t D, R;
  int tiles;      // of 32 channels
  void* dhidden;  // [tokens, R]
};

struct HiddenGradientMaps {
  CUtensorMap weight, x, dz;
};

template <class Element_, int W_, int N_>
struct HiddenGradientConfig {
  using Element = Element_;
  static constexpr int W = W_, P = 8;
  static constexpr int N = N_;                // columns of dhidden
  static constexpr int M = 128;               // tokens: two warpgroups of 64
  static constexpr int channels = 4 * P;      // 4 threads have a row
  static constexpr int K = channels * W / 2;  // of a stage of weights: half of a tile, its j = 0, 1 or 2, 3 (tile.cuh)
  static constexpr int steps = 2 * W;         // of k16 in a tile
  static constexpr int cluster = 2;
  static constexpr int consumers = 2;
  static constexpr int threads = kWarpgroup * (1 + consumers);
  using TileB = OperandTile<Element, Swizzle::b128, Major::mn, N, K>;
  using B = MatrixDescriptor<TileB>;
  using Mma = Wgmma<Element, N, Major::k, Major::mn>;
  // Each CTA of the cluster loads one j of each panel of a stage. At W = 3 that would not begin where the swizzle does:
  // there each loads every other panel.
  static constexpr bool whole_panels = 8 * W * TileB::row_bytes % kTileAlign != 0;
  static_assert(!whole_panels || TileB::panels % cluster == 0);
  static constexpr int box_j = whole_panels ? 2 : 1;
  static constexpr int row_bytes = channels * 2;
  static constexpr int x_rows = M + W - 1;  // row i is token m0 - (W-1) + i
  static constexpr int x_bytes = x_rows * row_bytes, dz_bytes = M * row_bytes;
  static constexpr int input_stages = 3;
  static constexpr int weight_stages = TileB::bytes > 24576 ? 5 : 6;  // what 227 KB have room for
};

template <class Config>
struct HiddenGradientShared {
  struct Weights {
    alignas(kTileAlign) char b[Config::TileB::bytes];
  };
  struct Inputs {
    alignas(128) char x[(Config::x_bytes + 127) / 128 * 128];  // [x_rows, 32]
    alignas(128) char dz[Config::dz_bytes];                    // [M, 32]
  };
  Weights weights[Config::weight_stages];
  Inputs inputs[Config::input_stages];
  Ring<Config::weight_stages> weight_ring;
  Ring<Config::input_stages> input_ring;
};
static_assert(sizeof(HiddenGradientShared<HiddenGradientConfig<bf16, 4, 256>>) <= kMaxSharedMemoryPerBlock);
static_assert(sizeof(HiddenGradientShared<HiddenGradientConfig<bf16, 4, 192>>) <= kMaxSharedMemoryPerBlock);

template <class Config>
__device__ void produce(HiddenGradientShared<Config>& shared, const HiddenGradientMaps& maps,
                        const HiddenGradientArguments& p) {
  const int m0 = blockIdx.x * Config::M, r0 = blockIdx.y * Config::N, rank = cluster_rank();
  Producer<Config::weight_stages> weights(shared.weight_ring);
  Producer<Config::input_stages> inputs(shared.input_ring);
#pragma unroll 1
  for (int tile = 0; tile < p.tiles; ++tile, inputs.advance()) {
    auto& stage = shared.inputs[inputs.acquire(Config::x_bytes + Config::dz_bytes)];
    tma_load(stage.x, maps.x, inputs.full(), CacheHint::evict_normal, tile * Config::channels, m0 - (Config::W - 1));
    tma_load(stage.dz, maps.dz, inputs.full(), CacheHint::evict_normal, tile * Config::channels, m0);
#pragma unroll 1
    for (int half = 0; half < 2; ++half, weights.advance()) {
      char* const b = shared.weights[weights.acquire(Config::TileB::bytes)].b;
#pragma unroll 1
      for (int panel = Config::whole_panels ? rank : 0; panel < Config::TileB::panels;
           panel += Config::whole_panels ? Config::cluster : 1) {
        const int j = Config::whole_panels ? 0 : rank;
        tma_load_multicast(b + panel * Config::TileB::panel_bytes + j * 8 * Config::W * Config::TileB::row_bytes,
                           maps.weight, weights.full(), 0b11, CacheHint::evict_last,
                           r0 + panel * Config::TileB::panel_width, 0, tile * 4, 0, 2 * half + j);
      }
    }
  }
}

// A operand of a tile: a thread's 2 tokens, in all k16 steps.
template <class Config>
using DtapsFragments = uint32_t[Config::steps][4];

// dtaps of a thread's two tokens, `first` and 8 below, and the channels from d on.
template <class Config>
__device__ void form_dtaps(DtapsFragments<Config>& dtaps, const HiddenGradientShared<Config>& shared, int stage,
                           const HiddenGradientArguments& p, const GradientPlace (&place)[2], int first, int d) {
  constexpr int W = Config::W, P = Config::P;
  const char* const x_rows = shared.inputs[stage].x + first * Config::row_bytes + threadIdx.x % 4 * P * 2;
  const char* const dz_rows = shared.inputs[stage].dz + first * Config::row_bytes + threadIdx.x % 4 * P * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Elements<P> dz = load_elements<P>(dz_rows + 8 * i * Config::row_bytes);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      Elements<P> x = load_elements<P>(x_rows + (8 * i + w) * Config::row_bytes);
      if (place[i].outside) x = {};
      if (place[i].position + w < W - 1 && d < p.D)
        x = input_of_state<P, W>(p.states, place[i].row, d, place[i].position + w);
#pragma unroll
      for (int j = 0; j < P / 2; ++j) {
        const int block = j * W + w;  // of 8 columns, two to a k16 step
        dtaps[block / 2][block % 2 * 2 + i] = multiply_pairs<typename Config::Element>(dz.words[j], x.words[j]);
      }
    }
  }
}

template <class Config>
struct HiddenGradientPipeline {
  Consumer<Config::weight_stages> weights;
  Consumer<Config::input_stages> inputs;
};

// dhidden [64, N] += dtaps weight of one tile, while `next` is made for the tile behind it.
template <class Config>
__device__ void multiply_tile(typename Config::Mma::Accumulator& dhidden, DtapsFragments<Config>& dtaps,
                              DtapsFragments<Config>& next, bool more, bool first_tile,
                              HiddenGradientShared<Config>& shared, HiddenGradientPipeline<Config>& pipeline,
                              const HiddenGradientArguments& p, const GradientPlace (&place)[2], int first, int d,
                              int thread) {
  using Mma = typename Config::Mma;
  int stage[2];
  wgmma_fence_operand(dtaps);
#pragma unroll
  for (int half = 0; half < 2; ++half, pipeline.weights.advance()) {
    stage[half] = pipeline.weights.wait();
    const typename Config::B b(shared.weights[stage[half]].b);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::W; ++step)
      // dhidden += dtaps weight   [64, N], k16
      Mma::rs(dhidden, dtaps[half * Config::W + step], b.at(0, step * Mma::K), !first_tile || half > 0 || step > 0);
    wgmma_commit_group();
  }
  if (more) {
    const int inputs = pipeline.inputs.wait();
    form_dtaps<Config>(next, shared, inputs, p, place, first, d);
    __syncwarp();
    if (thread % 32 == 0) pipeline.inputs.release(inputs);
    pipeline.inputs.advance();
  }
  wgmma_wait_group<1>();
  pipeline.weights.template release_all<Config::cluster>(stage[0], thread);
  wgmma_wait_group<0>();
  wgmma_fence_operand(dhidden);
  wgmma_hold_operand(dtaps);
  pipeline.weights.template release_all<Config::cluster>(stage[1], thread);
}

// Rounds and stores rows of an accumulator [64, N] to columns r0 .. of rows of `to` [.., R]; row_of(i) is null where
// row i (of 2) of this thread is not to be stored.
template <class Element, int registers, class F>
__device__ void store_accumulator(const float (&accumulator)[registers], int64_t r0, int64_t R, const F& row_of) {
  constexpr int groups = registers / 4;  // of 8 columns
  static_assert(groups % 4 == 0);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    auto* const row = static_cast<Element*>(row_of(i));
#pragma unroll
    for (int g = 0; g < groups; g += 4) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j)
        words[j] = pack<Element>(accumulator[(g + j) * 4 + 2 * i], accumulator[(g + j) * 4 + 2 * i + 1]);
      transpose_quad(words);
      const int64_t r = r0 + (g + threadIdx.x % 4) * 8;
      if (row != nullptr && r < R)
        __stcg(reinterpret_cast<uint4*>(row + r), make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

template <class Config>
__device__ void consume(HiddenGradientShared<Config>& shared, const HiddenGradientArguments& p) {
  const int thread = threadIdx.x % kWarpgroup, consumer = threadIdx.x / kWarpgroup - 1;
  const int64_t m0 = int64_t{blockIdx.x} * Config::M;
  const int first = 64 * consumer + accumulator_row(thread, 0);  // the other row of this thread is 8 below
  GradientPlace place[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) place[i] = gradient_place<Config::W>(p.sequences, m0 + first + 8 * i);
  HiddenGradientPipeline<Config> pipeline{Consumer<Config::weight_stages>(shared.weight_ring),
                                          Consumer<Config::input_stages>(shared.input_ring)};
  typename Config::Mma::Accumulator dhidden;
  DtapsFragments<Config> even, odd;
  int d = thread % 4 * Config::P;
  const int inputs = pipeline.inputs.wait();
  form_dtaps<Config>(even, shared, inputs, p, place, first, d);
  __syncwarp();
  if (thread % 32 == 0) pipeline.inputs.release(inputs);
  pipeline.inputs.advance();
#pragma unroll 1
  for (int tile = 0; tile < p.tiles; tile += 2) {
    d += Config::channels;
    multiply_tile<Config>(dhidden, even, odd, tile + 1 < p.tiles, tile == 0, shared, pipeline, p, place, first, d,
                          thread);
    if (tile + 1 == p.tiles) break;
    d += Config::channels;
    multiply_tile<Config>(dhidden, odd, even, tile + 2 < p.tiles, false, shared, pipeline, p, place, first, d, thread);
  }
  store_accumulator<typename Config::Element>(dhidden, int64_t{blockIdx.y} * Config::N, p.R, [&](int i) -> void* {
    const int64_t m = m0 + first + 8 * i;
    return m < p.sequences.tokens ? static_cast<typename Config::Element*>(p.dhidden) + m * p.R : nullptr;
  });
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1)
    hidden_gradient_kernel(const __grid_constant__ HiddenGradientMaps maps,
                           const __grid_constant__ HiddenGradientArguments p) {
  extern __shared__ __align__(kTileAlign) char memory[];
  auto& shared = *reinterpret_cast<HiddenGradientShared<Config>*>(memory);
  if (threadIdx.x == 0) {
    prefetch_tensormap(maps.weight), prefetch_tensormap(maps.x), prefetch_tensormap(maps.dz);
    shared.weight_ring.init(Config::consumers * Config::cluster);
    shared.input_ring.init(Config::consumers * kWarpgroup / 32);
    fence_mbarrier_init();
  }
  cluster_sync();
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  if (warp_index() < kWarpgroup / 32) {
    setmaxnreg_dec<24>();
    if (warp_index() == 0 && elect_one()) produce<Config>(shared, maps, p);
  } else {
    setmaxnreg_inc<240>();
    consume<Config>(shared, p);
  }
  __syncwarp();
  cluster_sync();  // a CTA must not exit while its peer may still write to its shared memory or arrive on its barriers
}

}  // namespace jet::hopper
