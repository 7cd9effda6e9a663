// The dynamic convolution of many tokens as one GEMM with an epilogue: kernels [tokens, D*W] = hidden weight^T are made
// tile by tile in registers, met by the inputs there, and forgotten. docs/dynamic_conv.md has the data sheet.
//
// A CTA keeps 128 tokens of `hidden` in shared memory and walks over tiles of 32 channels. Warpgroup 0 loads;
// warpgroups 1 and 2 take tiles in turns, so that one's epilogue runs under the other's tensor-core work. A cluster of
// 2 CTAs, neighbours in tokens, shares the weights: each loads half of a stage for both.
#pragma once

#include "csrc/dynamic_conv/tile.cuh"
#include "csrc/hopper/device.h"

namespace jet::hopper {

constexpr int64_t kResidentR = 512;  // the largest R whose tile of hidden fits beside the stages of weights

template <class Element, int W>
struct LargeConvConfig
    : ConvTile<Element, W, 8, 128> {  // 128 tokens: two m64 instructions per warpgroup share an operand B
  using Tile = ConvTile<Element, W, 8, 128>;
  static constexpr int cluster = 2;
  static constexpr int stages = 5;  // what R = 512 leaves room for
  static constexpr int consumers = 2;
  static constexpr int threads = kWarpgroup * (1 + consumers);
};

template <class Config>
struct LargeConvShared {
  struct Stage {
    alignas(kTileAlign) char b[Config::TileB::bytes];
  };
  Stage stage[Config::stages];
  alignas(128) char x[Config::consumers]
                     [(Config::x_bytes + 127) / 128 * 128];  // [M + W - 1, 32]: row i is token m0 - (W-1) + i
  alignas(16) float bias[Config::consumers][Config::bias_size];
  TokenPlace places[Config::M];
  Ring<Config::stages> ring;
  Mbarrier hidden_loaded, x_loaded[Config::consumers], x_read[Config::consumers];
  // All warps of the other consumer have seen its last stage arrive: this one's stages are the next of the ring. All,
  // because a warp that lags behind would miss its own turn when the next one comes.
  Mbarrier turn[Config::consumers];
};
// With W = 4: everything there is.
static_assert(kResidentR / 64 * 128 * 128 + sizeof(LargeConvShared<LargeConvConfig<bf16, 4>>) <= 227 * 1024);

// How the channel tiles are cut.
struct ChannelCut {
  int tiles, per_part;  // in all, of a CTA
};

// The channel tiles of this CTA.
struct ChannelPart {
  int first, count;
  __device__ explicit ChannelPart(const ChannelCut& cut) {
    first = blockIdx.y * cut.per_part;
    count = min(cut.per_part, cut.tiles - first);
  }
};

template <class Config>
__device__ void produce(LargeConvShared<Config>& shared, char* hidden, const DynamicConvMaps& maps,
                        const DynamicConvArguments& p, const ChannelPart& part) {
  const int m0 = blockIdx.x * Config::M, half = cluster_rank();  // of j: half of a stage
  shared.hidden_loaded.arrive_expect_tx(p.panels * Config::TileA::bytes);
#pragma unroll 1
  for (int panel = 0; panel < p.panels; ++panel)
    tma_load(hidden + panel * Config::TileA::bytes, maps.hidden, shared.hidden_loaded, CacheHint::evict_normal,
             panel * Config::K, m0);
  Producer<Config::stages> ring(shared.ring);
  Cursor<Config::consumers> x(Parity::past());
  for (int i = 0; i < part.count; ++i, x.advance()) {
    const int tile = part.first + i;
#pragma unroll 1
    for (int panel = 0; panel < p.panels; ++panel, ring.advance()) {
      char* const b = shared.stage[ring.acquire(Config::TileB::bytes)].b + half * Config::TileB::bytes / 2;
      tma_load_multicast(b, maps.weight, ring.full(), 0b11, CacheHint::evict_last, panel * Config::K, 0, tile * 4, 0,
                         2 * half);
    }
    // Needed last, so asked for last: the wait for the epilogue two tiles ago must not hold up the weights.
    shared.x_read[x.stage].wait(x.parity);
    shared.x_loaded[x.stage].arrive_expect_tx(Config::x_bytes);
    tma_load(shared.x[x.stage], maps.x, shared.x_loaded[x.stage], CacheHint::evict_normal, tile * Config::channels,
             m0 - (Config::W - 1));
  }
}

// kernel[128 tokens, N] of one tile
template <class Config>
__device__ void generate(typename Config::Mma::Accumulator (&kernel)[2], LargeConvShared<Config>& shared,
                         const char* hidden, Consumer<Config::stages>& ring, int panels, int consumer, int thread) {
  using Mma = typename Config::Mma;
  int previous = 0;
  for (int panel = 0; panel < panels; ++panel, ring.advance()) {
    const int stage = ring.wait();
    if (panel == panels - 1 && thread % 32 == 0) shared.turn[1 - consumer].arrive();
    const typename Config::A a(hidden + panel * Config::TileA::bytes);
    const typename Config::B b(shared.stage[stage].b);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Config::K; k += Mma::K)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        Mma::ss(kernel[half], a.at(64 * half, k), b.at(0, k),
                panel > 0 || k > 0);  // kernel += hidden weightᵀ   [64, N], k16
    wgmma_commit_group();
    if (panel > 0) {  // the stage before this one has been read when only this one's products are left
      wgmma_wait_group<1>();
      ring.template release_all<Config::cluster>(previous, thread);
    }
    previous = stage;
  }
  wgmma_wait_group<0>();
  wgmma_fence_operand(kernel[0]);
  wgmma_fence_operand(kernel[1]);
  ring.template release_all<Config::cluster>(previous, thread);
}

// What a thread has of a tile: 4 tokens, i < 4, so many rows below accumulator_row(thread, 0), in half i / 2 of the
// accumulators.
__device__ constexpr int below(int i) { return i / 2 * 64 + i % 2 * 8; }

// Brings the states that the epilogue will read into the L2: there it meets them one row after the other.
template <class Config>
__device__ void prefetch_states(const LargeConvShared<Config>& shared, const DynamicConvArguments& p, int rows,
                                int64_t d, int thread) {
  if (p.states.in == nullptr || d >= p.D) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = accumulator_row(thread, 0) + below(i);
    if (row < rows && shared.places[row].position < Config::W - 1)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(state_in<Config::W>(p.states, shared.places[row], d)));
  }
}

// The first `rows` rows of a tile
template <class Config>
__device__ void convolve(const typename Config::Mma::Accumulator (&kernel)[2], const LargeConvShared<Config>& shared,
                         const DynamicConvArguments& p, int rows, int64_t d, int consumer, int thread) {
  using Tile = typename Config::Tile;
  constexpr int W = Config::W, P = Config::P;
  if (d >= p.D) return;
  float bias[P][W];
  read_bias<Tile>(bias, shared.bias[consumer]);
  const int first = accumulator_row(thread, 0);
  const char* const window = own_window<Tile>(shared.x[consumer], first, thread);
  auto* const y = static_cast<typename Config::Element*>(p.y) + (int64_t{blockIdx.x} * Config::M + first) * p.D + d;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + below(i) >= rows) continue;
    const TokenPlace place = shared.places[first + below(i)];
    Elements<P> x[W];
    read_window<Tile>(x, window + below(i) * kRowBytes<Tile>);
    if (place.position < W - 1) begin_of_sequence(x, load_state<P, W>(p.states, place, d), place.position);
    convolve_row<Tile>(kernel[i / 2], bias, x, p, place, y + below(i) * p.D, d, i % 2);
  }
}

template <class Config>
__device__ void consume(LargeConvShared<Config>& shared, const char* hidden, const DynamicConvArguments& p,
                        const ChannelPart& part) {
  const int thread = threadIdx.x % kWarpgroup, consumer = threadIdx.x / kWarpgroup - 1;
  const int all = 1, mine = 2 + consumer;  // hardware barriers: of both consumers, of this one
  const int m0 = blockIdx.x * Config::M,
            rows = min(Config::M, static_cast<int>(p.sequences.tokens) - m0);  // none where it pads a cluster
  if (consumer == 0 && thread < rows) shared.places[thread] = place_of_token<Config::W>(p.sequences, m0 + thread);
  named_barrier_sync(all, Config::consumers * kWarpgroup);
  Consumer<Config::stages> ring(shared.ring);
  Parity x = Parity::first(), turn = consumer == 0 ? Parity::past() : Parity::first();
  if (part.count > consumer) shared.hidden_loaded.wait(Parity::first());
  if (consumer == 1) ring.skip(p.panels);
  for (int i = consumer; i < part.count; i += Config::consumers, x.next(), turn.next()) {
    const int tile = part.first + i;
    const int64_t d = int64_t{tile} * Config::channels + thread % 4 * Config::P;
    const float bias = load_bias<typename Config::Tile>(p, tile, thread);
    prefetch_states<Config>(shared, p, rows, d, thread);
    typename Config::Mma::Accumulator kernel[2];
    // A barrier tells odd from even turns only: without this wait, stages of the turn before would be taken for this
    // one's.
    shared.turn[consumer].wait(turn);
    generate<Config>(kernel, shared, hidden, ring, p.panels, consumer, thread);
    ring.skip(p.panels);  // the other consumer's tile
    if (thread < Config::N) shared.bias[consumer][Config::bias_at(thread)] = bias;
    shared.x_loaded[consumer].wait(x);
    named_barrier_sync(mine, kWarpgroup);
    convolve<Config>(kernel, shared, p, rows, d, consumer, thread);
    named_barrier_sync(mine, kWarpgroup);
    if (thread == 0) shared.x_read[consumer].arrive();
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1)
    dynamic_conv_kernel(const __grid_constant__ DynamicConvMaps maps, const __grid_constant__ DynamicConvArguments p,
                        const __grid_constant__ ChannelCut cut) {
  extern __shared__ __align__(kTileAlign) char hidden[];  // [panels][128 tokens, 64]
  auto& shared = *reinterpret_cast<LargeConvShared<Config>*>(hidden + p.panels * Config::TileA::bytes);
  if (threadIdx.x == 0) {
    maps.prefetch_all();
    shared.ring.init(Config::cluster);  // a stage is read by one warpgroup of each CTA
    shared.hidden_loaded.init(1);
    for (int i = 0; i < Config::consumers; ++i)
      shared.x_loaded[i].init(1), shared.x_read[i].init(1), shared.turn[i].init(kWarpgroup / 32);
    fence_mbarrier_init();
  }
  cluster_sync();
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  const ChannelPart part(cut);
  if (warp_index() < kWarpgroup / 32) {
    setmaxnreg_dec<40>();
    if (warp_index() == 0) {
      if (elect_one()) produce<Config>(shared, hidden, maps, p, part);
    } else {
      const int64_t ctas = int64_t{gridDim.x} * gridDim.y, cta = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
      pass_states_on<typename Config::Tile>(p, cta * 3 + warp_index() - 1, ctas * 3);
    }
  } else {
    setmaxnreg_inc<232>();
    consume<Config>(shared, hidden, p, part);
  }
  __syncwarp();
  cluster_sync();  // a CTA must not exit while its peer may still write to its shared memory or arrive on its barriers
}

// ---- Host
// One CTA fits a multiprocessor. A cut of the channels costs another load of hidden's tile, about as long as two
// channel tiles take.
inline ChannelCut choose_channel_cut(int64_t token_tiles, int tiles, int multiprocessors) {
  ChannelCut best{tiles, tiles};
  int64_t least = INT64_MAX;
  for (int per_part = tiles; per_part >= 1; --per_part) {
    const int parts = (tiles + per_part - 1) / per_part;
    const int64_t waves = (token_tiles * parts + multiprocessors - 1) / multiprocessors, cost = waves * (per_part + 2);
    if (cost < least) least = cost, best.per_part = per_part;
    if (waves > 1 && parts > 8 * multiprocessors) break;
  }
  return best;
}

template <class Config>
void launch_large(const DynamicConvLaunch& l, cudaStream_t stream) {
  DynamicConvArguments p = l.arguments;
  p.panels = static_cast<int>((l.R + Config::K - 1) / Config::K);
  constexpr int pair = Config::M * Config::cluster;  // tokens of a cluster
  const int64_t token_tiles = (p.sequences.tokens + pair - 1) / pair * Config::cluster;
  const int tiles = static_cast<int>((l.D + Config::channels - 1) / Config::channels);
  const ChannelCut cut = choose_channel_cut(token_tiles, tiles, current_device_facts().multiprocessors);
  const dim3 grid(static_cast<unsigned>(token_tiles), static_cast<unsigned>((tiles + cut.per_part - 1) / cut.per_part));
  const int shared_bytes = p.panels * Config::TileA::bytes + static_cast<int>(sizeof(LargeConvShared<Config>));
  launch(l.op, {grid, Config::threads, shared_bytes, Config::cluster, true}, stream, dynamic_conv_kernel<Config>,
         make_dynamic_conv_maps<typename Config::Tile>(l, Config::cluster), p, cut);
}

template <class Element>
void launch_large_of(const DynamicConvLaunch& l, cudaStream_t stream) {
  if (l.W == 2) return launch_large<LargeConvConfig<Element, 2>>(l, stream);
  if (l.W == 3) return launch_large<LargeConvConfig<Element, 3>>(l, stream);
  launch_large<LargeConvConfig<Element, 4>>(l, stream);
}

}  // namespace jet::hopper
