// The dynamic convolution of few tokens, and of any R: a CTA makes one tile of kernels. What bounds it is the stream of
// weights, so every multiprocessor takes part, all that can be asked for early is, and (nearly) all stages of a tile
// are in flight at once. docs/dynamic_conv.md has the data sheet.
#pragma once

#include "csrc/dynamic_conv/tile.cuh"

namespace jet::hopper {

template <class Element, int W, int P, int consumers_>
struct SmallConvConfig : ConvTile<Element, W, P, 64 * consumers_> {
  using Tile = ConvTile<Element, W, P, 64 * consumers_>;
  static constexpr int consumers = consumers_;  // warpgroups, an m64 instruction each; a warp more loads
  static constexpr int threads = kWarpgroup * consumers + 32;
  static constexpr int stages = 6;                       // all of R = 384
  static constexpr int blocks = consumers == 1 ? 2 : 1;  // that fit a multiprocessor
  static constexpr int stage_bytes = Tile::TileA::bytes + Tile::TileB::bytes;
};

template <class Config>
struct SmallConvShared {
  struct Stage {
    alignas(kTileAlign) char a[Config::TileA::bytes];
    alignas(kTileAlign) char b[Config::TileB::bytes];
  };
  Stage stage[Config::stages];
  alignas(128) char x[Config::x_bytes];  // [M + W - 1, channels]: row i is token m0 - (W-1) + i
  alignas(16) float bias[Config::bias_size];
  Ring<Config::stages> ring;
  Mbarrier x_loaded;
};
static_assert(2 * (sizeof(SmallConvShared<SmallConvConfig<bf16, 4, 4, 1>>) + 1024) <=
              228 * 1024);  // 1 KB of a CTA is the system's
static_assert(sizeof(SmallConvShared<SmallConvConfig<bf16, 4, 8, 2>>) <= 227 * 1024);

template <class Config>
__device__ void produce(SmallConvShared<Config>& shared, const DynamicConvMaps& maps, const DynamicConvArguments& p) {
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

// kernel [64 tokens, N]
template <class Config>
__device__ void generate(typename Config::Mma::Accumulator& kernel, SmallConvShared<Config>& shared, int panels,
                         int consumer, int thread) {
  using Mma = typename Config::Mma;
  Consumer<Config::stages> ring(shared.ring);
  int previous = 0;
#pragma unroll 1
  for (int panel = 0; panel < panels; ++panel, ring.advance()) {
    const int stage = ring.wait();
    const typename Config::A a(shared.stage[stage].a);
    const typename Config::B b(shared.stage[stage].b);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Config::K; k += Mma::K)
      Mma::ss(kernel, a.at(64 * consumer, k), b.at(0, k),
              panel > 0 || k > 0);  // kernel += hidden weightᵀ   [64, N], k16
    wgmma_commit_group();
    if (panel > 0) {  // the stage before this one has been read when only this one's products are left
      wgmma_wait_group<1>();
      ring.template release_all<1>(previous, thread);
    }
    previous = stage;
  }
  wgmma_wait_group<0>();
  wgmma_fence_operand(kernel);
}

template <class Config>
__device__ void consume(SmallConvShared<Config>& shared, const DynamicConvArguments& p) {
  using Tile = typename Config::Tile;
  constexpr int W = Config::W, P = Config::P;
  const int thread = threadIdx.x % kWarpgroup, consumer = threadIdx.x / kWarpgroup, tile = blockIdx.y;
  const int64_t m0 = int64_t{blockIdx.x} * Config::M, d = int64_t{tile} * Config::channels + thread % 4 * P;
  const int first = 64 * consumer + accumulator_row(thread, 0);  // row of the tile; the other of this thread is 8 below
  const int all = 1;                                             // hardware barrier
  const float one_bias = load_bias<Tile>(p, tile, threadIdx.x);
  // What the epilogue will need of memory, asked for before the weights arrive.
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

  typename Config::Mma::Accumulator kernel;
  generate<Config>(kernel, shared, p.panels, consumer, thread);
  shared.x_loaded.wait(Parity::first());
  float bias[P][W];
  read_bias<Tile>(bias, shared.bias);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!inside[i]) continue;
    Elements<P> x[W];
    read_window<Tile>(x, own_window<Tile>(shared.x, first + 8 * i, thread));
    if (place[i].position < W - 1) begin_of_sequence(x, state[i], place[i].position);
    auto* const y = static_cast<typename Config::Element*>(p.y) + (m0 + first + 8 * i) * p.D + d;
    convolve_row<Tile>(kernel, bias, x, p, place[i], y, d, i);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, Config::blocks)
    small_dynamic_conv_kernel(const __grid_constant__ DynamicConvMaps maps,
                              const __grid_constant__ DynamicConvArguments p) {
  extern __shared__ __align__(kTileAlign) char memory[];
  auto& shared = *reinterpret_cast<SmallConvShared<Config>*>(memory);
  const bool producer = warp_index() == Config::threads / 32 - 1;
  if (producer && elect_one()) {
    maps.prefetch_all();
    shared.ring.init(Config::consumers);
    shared.x_loaded.init(1);
    fence_mbarrier_init();
    // Weights into the L2, where it does no harm should the kernel before still be writing them; once for all tiles of
    // tokens, and no more than are soon loaded.
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
    pass_states_on<typename Config::Tile>(p, int64_t{blockIdx.y} * gridDim.x + blockIdx.x,
                                          int64_t{gridDim.x} * gridDim.y);
  } else {
    consume<Config>(shared, p);
  }
}

// ---- Host
template <class Config>
void launch_small(const DynamicConvLaunch& l, cudaStream_t stream) {
  DynamicConvArguments p = l.arguments;
  p.panels = static_cast<int>((l.R + Config::K - 1) / Config::K);
  const auto maps = make_dynamic_conv_maps<typename Config::Tile>(l, 1);
  const dim3 grid(static_cast<unsigned>((p.sequences.tokens + Config::M - 1) / Config::M),
                  static_cast<unsigned>((l.D + Config::channels - 1) / Config::channels));
  const int shared_bytes = sizeof(SmallConvShared<Config>);
  launch(l.op, {grid, Config::threads, shared_bytes, 1, true}, stream, small_dynamic_conv_kernel<Config>, maps, p);
}

// The tile. 64 tokens, 16 channels: one m64n64 instruction a k16 step, and D = 3072 gives 192 CTAs, 4096 gives 256; two
// fit each of 132 multiprocessors, so all stream at once. More tokens: 128 and 32 channels, for every tile of channels
// reads all of hidden again, which at 128 tokens and 16 channels would be twice the weights; 96 and 128 CTAs. It also
// serves W = 2 and 3, which no model has.
template <class Element>
void launch_small_of(const DynamicConvLaunch& l, cudaStream_t stream) {
  if (l.W == 2) return launch_small<SmallConvConfig<Element, 2, 8, 2>>(l, stream);
  if (l.W == 3) return launch_small<SmallConvConfig<Element, 3, 8, 2>>(l, stream);
  if (l.arguments.sequences.tokens <= 64) return launch_small<SmallConvConfig<Element, 4, 4, 1>>(l, stream);
  launch_small<SmallConvConfig<Element, 4, 8, 2>>(l, stream);
}

}  // namespace jet::hopper
