// The single-tile kernel: the generator's GEMM of few tokens, and of an R too large for the ping-pong kernel. A CTA
// makes one tile of taps and convolves it. What bounds it is the stream of weights: so every multiprocessor takes part,
// all that can be asked for early is, and (nearly) all stages of a tile are in flight at once. docs/dynamic_conv.md has
// the data sheet.
#pragma once

#include "csrc/dynamic_conv/gemm/tile.cuh"
#include "csrc/hopper/device.h"
#include "csrc/hopper/warp_specialization.h"

namespace jet::hopper {

// silu_hidden: the generator reads silu(hidden).
template <class Element, int W, int P, int consumers_, bool silu_hidden_ = false>
struct SingleTileConfig : ConvTile<Element, W, P, 64 * consumers_> {
  using Tile = ConvTile<Element, W, P, 64 * consumers_>;
  static constexpr bool silu_hidden = silu_hidden_;
  static constexpr int consumers = consumers_;  // warpgroups, an m64 instruction each; the producer is one more warp
  static constexpr int threads = kWarpgroup * consumers + 32;
  static constexpr int stages = 6;                       // all of R = 384
  static constexpr int blocks = consumers == 1 ? 2 : 1;  // that fit a multiprocessor
  static constexpr int stage_bytes = Tile::TileA::bytes + Tile::TileB::bytes;
};

template <class Config>
struct SingleTileShared {
  struct Stage {
    alignas(kTileAlign) char a[Config::TileA::bytes];
    alignas(kTileAlign) char b[Config::TileB::bytes];
  };
  Stage stage[Config::stages];
  alignas(128) char x[Config::x_bytes];  // [x_rows, channels]
  alignas(16) float bias[Config::bias_size];
  Ring<Config::stages> ring;
  Mbarrier x_loaded;
};
// Two CTAs to a multiprocessor.
static_assert(2 * (sizeof(SingleTileShared<SingleTileConfig<bf16, 4, 4, 1>>) + kReservedSharedMemoryPerBlock) <=
              kSharedMemoryPerMultiprocessor);
static_assert(sizeof(SingleTileShared<SingleTileConfig<bf16, 4, 8, 2>>) <= kMaxSharedMemoryPerBlock);

template <class Config>
__device__ void produce(SingleTileShared<Config>& shared, const DynamicConvMaps& maps, const DynamicConvArguments& p) {
  const int m0 = blockIdx.x * Config::M, tile = blockIdx.y;
  Producer<Config::stages> ring(shared.ring);
#pragma unroll 1
  for (int panel = 0; panel < p.panels; ++panel, ring.advance()) {
    auto& stage = shared.stage[ring.acquire(Config::stage_bytes)];
    tma_load(stage.b, maps.weight, ring.full(), CacheHint::evict_last, panel * Config::K, 0, tile * 4, 0, 0);
    tma_load(stage.a, maps.hidden, ring.full(), CacheHint::evict_normal, panel * Config::K, m0);
    if (panel > 0) continue;
    shared.x_loaded.arrive_expect_tx(Config::x_bytes);
    tma_load(shared.x, maps.x, shared.x_loaded, CacheHint::evict_normal, tile * Config::channels, m0 - (Config::W - 1));
  }
}

// hidden <- silu(hidden), rounded, in shared memory: the first `rows` tokens of this consumer, which are 128 bytes
// each, one after the other. Where an element of a row lies does not matter, so the swizzle does not.
template <class Config>
__device__ void silu_in_place(char* own_rows, int rows, int consumer, int thread) {
#pragma unroll 1
  for (int i = thread; i < rows * (Config::K * 2 / 16); i += kWarpgroup) {
    char* const eight = own_rows + i * 16;
    float x[8];
    unpack_elements<typename Config::Element>(x, load_elements<8>(eight));
    const Elements<8> y = activate<typename Config::Element>(x, true);
    *reinterpret_cast<uint4*>(eight) = make_uint4(y.words[0], y.words[1], y.words[2], y.words[3]);
  }
  fence_proxy_async();
  named_barrier_sync(2 + consumer, kWarpgroup);
}

// The mainloop: taps [64, N] = hidden weight^T, the tokens of this consumer, of which `rows` are there
template <class Config>
__device__ void generate(typename Config::Mma::Accumulator& taps, SingleTileShared<Config>& shared, int panels,
                         int consumer, int thread, [[maybe_unused]] int rows) {
  using Mma = typename Config::Mma;
  Consumer<Config::stages> ring(shared.ring);
  int previous = 0;
#pragma unroll 1
  for (int panel = 0; panel < panels; ++panel, ring.advance()) {
    const int stage = ring.wait();
    if constexpr (Config::silu_hidden)
      silu_in_place<Config>(shared.stage[stage].a + 64 * consumer * Config::K * 2, rows, consumer, thread);
    const typename Config::A a(shared.stage[stage].a);
    const typename Config::B b(shared.stage[stage].b);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Config::K; k += Mma::K)
      // taps += hidden weightᵀ   [64, N], k16
      Mma::ss(taps, a.at(64 * consumer, k), b.at(0, k), panel > 0 || k > 0);
    wgmma_commit_group();
    if (panel > 0) {  // the stage before this one has been read when only this one's products are left
      wgmma_wait_group<1>();
      ring.template release_all<1>(previous, thread);
    }
    previous = stage;
  }
  wgmma_wait_group<0>();
  wgmma_fence_operand(taps);
}

template <class Config>
__device__ void consume(SingleTileShared<Config>& shared, const DynamicConvArguments& p) {
  using Tile = typename Config::Tile;
  constexpr int W = Config::W, P = Config::P;
  const int thread = threadIdx.x % kWarpgroup, consumer = threadIdx.x / kWarpgroup, tile = blockIdx.y;
  const int64_t m0 = int64_t{blockIdx.x} * Config::M, d = int64_t{tile} * Config::channels + thread % 4 * P;
  const int first = 64 * consumer + accumulator_row(thread, 0);  // row of the tile; the other of this thread is 8 below
  const int all = 1;                                             // named barrier, of all consumers
  const float one_bias = load_bias<Tile>(p, tile, threadIdx.x);
  // What the epilogue needs of memory, asked for before the weights arrive.
  bool inside[2];
  TokenPlace place[2];
  Elements<P*(W - 1)> state[2] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    inside[i] = m0 + first + 8 * i < p.sequences.tokens && d < p.D;
    if (inside[i]) place[i] = place_of_token<W>(p.sequences, m0 + first + 8 * i);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (inside[i] && place[i].position < W - 1) state[i] = load_state<P, W>(p.states, place[i], d);
  if (threadIdx.x < Config::N) shared.bias[Config::bias_at(threadIdx.x)] = one_bias;
  named_barrier_sync(all, Config::consumers * kWarpgroup);

  typename Config::Mma::Accumulator taps;
  const int rows = static_cast<int>(min(max(p.sequences.tokens - m0 - 64 * consumer, int64_t{0}), int64_t{64}));
  generate<Config>(taps, shared, p.panels, consumer, thread, rows);
  shared.x_loaded.wait(PhaseParity::first());
  float bias[P][W];
  read_bias<Tile>(bias, shared.bias);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!inside[i]) continue;
    Elements<P> x[W];
    read_window<Tile>(x, own_window<Tile>(shared.x, first + 8 * i, thread));
    if (place[i].position < W - 1) begin_of_sequence(x, state[i], place[i].position);
    auto* const y = static_cast<typename Config::Element*>(p.y) + (m0 + first + 8 * i) * p.D + d;
    convolve_row<Tile>(taps, bias, x, p, place[i], y, d, i);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::blocks)
    single_tile_dynamic_conv_kernel(const __grid_constant__ DynamicConvMaps maps,
                                    const __grid_constant__ DynamicConvArguments p) {
  extern __shared__ __align__(kTileAlign) char memory[];
  auto& shared = *reinterpret_cast<SingleTileShared<Config>*>(memory);
  const bool producer = warp_index() == Config::threads / 32 - 1;
  if (producer && elect_one()) {
    maps.prefetch_all();
    shared.ring.init(Config::consumers);
    shared.x_loaded.init(1);
    fence_mbarrier_init();
    // Weights into the L2, where it does no harm should the kernel before still be writing them. Once for all tiles of
    // tokens, and no more of them than are soon loaded.
    const int soon = min(p.panels, 2 * Config::stages);
#pragma unroll 1
    for (int panel = 0; blockIdx.x == 0 && panel < soon; ++panel)
      tma_prefetch(maps.weight, panel * Config::K, 0, static_cast<int>(blockIdx.y) * 4, 0, 0);
  }
  __syncthreads();
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  if (producer) {
    if (elect_one()) produce<Config>(shared, maps, p);
    __syncwarp();
    copy_states_of_empty_sequences<Config::W>(p.sequences, p.states, p.D, int64_t{blockIdx.y} * gridDim.x + blockIdx.x,
                                              int64_t{gridDim.x} * gridDim.y);
  } else {
    consume<Config>(shared, p);
  }
}

// ---- Host
template <class Config>
void launch_single_tile(const DynamicConvCall& call, cudaStream_t stream) {
  const LaunchShape shape{
      .grid = dim3(static_cast<unsigned>((call.sequences.tokens + Config::M - 1) / Config::M),
                   static_cast<unsigned>((call.in.D + Config::channels - 1) / Config::channels)),
      .threads = Config::threads,
      .shared_bytes = sizeof(SingleTileShared<Config>),
      .programmatic = true,
  };
  launch(call.op, shape, stream, single_tile_dynamic_conv_kernel<Config>, call.maps<typename Config::Tile>(1),
         call.arguments<typename Config::Tile>());
}

}  // namespace jet::hopper
