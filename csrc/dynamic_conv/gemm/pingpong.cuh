// The ping-pong kernel: the generator's GEMM, taps [tokens, D*W] = hidden weight^T, of more than 128 tokens, tile by
// tile in registers with the convolution as its epilogue. docs/dynamic_conv.md has the data sheet.
//
// A CTA keeps 128 tokens of `hidden` in shared memory and walks over tiles of 32 channels. Warpgroup 0 is the producer;
// the consumers, warpgroups 1 and 2, take tiles in turns (ping-pong), so that the epilogue of one runs under the
// tensor-core work of the other. The cluster is 2 CTAs, neighbours in tokens, that share the weights: each loads half
// of a stage and multicasts it to both.
#pragma once

#include "csrc/dynamic_conv/gemm/tile.cuh"
#include "csrc/hopper/cluster.h"
#include "csrc/hopper/device.h"
#include "csrc/hopper/warp_specialization.h"

namespace jet::hopper {

constexpr int64_t kResidentR = 512;  // the largest R whose [128, R] of hidden fits beside the stages of weights

// 128 tokens: two m64 instructions of a warpgroup share an operand B.
template <class Element, int W>
struct PingpongConfig : ConvTile<Element, W, 8, 128> {
  using Tile = ConvTile<Element, W, 8, 128>;
  static constexpr int cluster = 2;
  static constexpr int stages = 5;  // what R = 512 leaves room for
  static constexpr int consumers = 2;
  static constexpr int threads = kWarpgroup * (1 + consumers);
};

template <class Config>
struct PingpongShared {
  struct Stage {
    alignas(kTileAlign) char b[Config::TileB::bytes];
  };
  Stage stage[Config::stages];
  alignas(128) char x[Config::consumers][(Config::x_bytes + 127) / 128 * 128];  // [x_rows, 32]
  alignas(16) float bias[Config::consumers][Config::bias_size];
  TokenPlace places[Config::M];
  Ring<Config::stages> ring;
  Mbarrier hidden_loaded, x_loaded[Config::consumers], x_read[Config::consumers];
  // All warps of the other consumer have seen the last stage of its tile arrive: the next stages of the ring are this
  // consumer's. All, because a warp that lags behind would miss its own turn when the next one comes. (CUTLASS: an
  // ordered sequence barrier.)
  Mbarrier turn[Config::consumers];
};
// With R = kResidentR and W = 4, nearly all the shared memory that a CTA can have.
static_assert(kResidentR / 64 * 128 * 128 + sizeof(PingpongShared<PingpongConfig<bf16, 4>>) <=
              kMaxSharedMemoryPerBlock);

// How the tiles of channels are split among the CTAs of a token tile.
struct ChannelSplit {
  int tiles, per_cta;
};

// The tiles of channels of this CTA.
struct ChannelTiles {
  int first, count;
  __device__ explicit ChannelTiles(const ChannelSplit& split) {
    first = blockIdx.y * split.per_cta;
    count = min(split.per_cta, split.tiles - first);
  }
};

template <class Config>
__device__ void produce(PingpongShared<Config>& shared, char* hidden, const DynamicConvMaps& maps,
                        const DynamicConvArguments& p, const ChannelTiles& own) {
  const int m0 = blockIdx.x * Config::M, half = cluster_rank();  // of a stage's columns: of their j (tile.cuh)
  shared.hidden_loaded.arrive_expect_tx(p.panels * Config::TileA::bytes);
#pragma unroll 1
  for (int panel = 0; panel < p.panels; ++panel)
    tma_load(hidden + panel * Config::TileA::bytes, maps.hidden, shared.hidden_loaded, CacheHint::evict_normal,
             panel * Config::K, m0);
  Producer<Config::stages> ring(shared.ring);
  PipelineState<Config::consumers> x(PhaseParity::preceding());
  for (int i = 0; i < own.count; ++i, x.advance()) {
    const int tile = own.first + i;
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

// The mainloop of one tile: taps [128, N] = hidden weight^T
template <class Config>
__device__ void generate(typename Config::Mma::Accumulator (&taps)[2], PingpongShared<Config>& shared,
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
        // taps += hidden weightᵀ   [64, N], k16
        Mma::ss(taps[half], a.at(64 * half, k), b.at(0, k), panel > 0 || k > 0);
    wgmma_commit_group();
    if (panel > 0) {  // the stage before this one has been read when only this one's products are left
      wgmma_wait_group<1>();
      ring.template release_all<Config::cluster>(previous, thread);
    }
    previous = stage;
  }
  wgmma_wait_group<0>();
  wgmma_fence_operand(taps[0]);
  wgmma_fence_operand(taps[1]);
  ring.template release_all<Config::cluster>(previous, thread);
}

// A thread has 4 tokens of a tile. Token i < 4 is below(i) rows below accumulator_row(thread, 0), and its taps are in
// accumulator i / 2.
__device__ constexpr int below(int i) { return i / 2 * 64 + i % 2 * 8; }

// Brings the states that the epilogue will read into the L2. The epilogue itself reads them token by token.
template <class Config>
__device__ void prefetch_states(const PingpongShared<Config>& shared, const DynamicConvArguments& p, int rows,
                                int64_t d, int thread) {
  if (p.states.in == nullptr || d >= p.D) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = accumulator_row(thread, 0) + below(i);
    if (row < rows && shared.places[row].position < Config::W - 1)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(state_in<Config::W>(p.states, shared.places[row], d)));
  }
}

// The epilogue of one tile, of its first `rows` tokens.
template <class Config>
__device__ void convolve(const typename Config::Mma::Accumulator (&taps)[2], const PingpongShared<Config>& shared,
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
    read_window<Tile>(x, window + below(i) * Tile::x_row_bytes);
    if (place.position < W - 1) begin_of_sequence(x, load_state<P, W>(p.states, place, d), place.position);
    convolve_row<Tile>(taps[i / 2], bias, x, p, place, y + below(i) * p.D, d, i % 2);
  }
}

template <class Config>
__device__ void consume(PingpongShared<Config>& shared, const char* hidden, const DynamicConvArguments& p,
                        const ChannelTiles& own) {
  const int thread = threadIdx.x % kWarpgroup, consumer = threadIdx.x / kWarpgroup - 1;
  const int all = 1, mine = 2 + consumer;  // named barriers: of both consumers, of this one
  const int m0 = blockIdx.x * Config::M;
  const int rows = min(Config::M, static_cast<int>(p.sequences.tokens) - m0);  // none in a CTA that pads its cluster
  if (consumer == 0 && thread < rows) shared.places[thread] = place_of_token<Config::W>(p.sequences, m0 + thread);
  named_barrier_sync(all, Config::consumers * kWarpgroup);
  Consumer<Config::stages> ring(shared.ring);
  PhaseParity x = PhaseParity::first(), turn = consumer == 0 ? PhaseParity::preceding() : PhaseParity::first();
  if (own.count > consumer) shared.hidden_loaded.wait(PhaseParity::first());
  if (consumer == 1) ring.advance(p.panels);
  for (int i = consumer; i < own.count; i += Config::consumers, x.flip(), turn.flip()) {
    const int tile = own.first + i;
    const int64_t d = int64_t{tile} * Config::channels + thread % 4 * Config::P;
    const float bias = load_bias<typename Config::Tile>(p, tile, thread);
    prefetch_states<Config>(shared, p, rows, d, thread);
    typename Config::Mma::Accumulator taps[2];
    // An mbarrier tells odd from even phases only: without this wait, the stages of an earlier turn would be taken for
    // those of this one.
    shared.turn[consumer].wait(turn);
    generate<Config>(taps, shared, hidden, ring, p.panels, consumer, thread);
    ring.advance(p.panels);  // the other consumer's tile
    if (thread < Config::N) shared.bias[consumer][Config::bias_at(thread)] = bias;
    shared.x_loaded[consumer].wait(x);
    named_barrier_sync(mine, kWarpgroup);
    convolve<Config>(taps, shared, p, rows, d, consumer, thread);
    named_barrier_sync(mine, kWarpgroup);
    if (thread == 0) shared.x_read[consumer].arrive();
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1)
    pingpong_dynamic_conv_kernel(const __grid_constant__ DynamicConvMaps maps,
                                 const __grid_constant__ DynamicConvArguments p,
                                 const __grid_constant__ ChannelSplit split) {
  extern __shared__ __align__(kTileAlign) char hidden[];  // [panels][128 tokens, 64]
  auto& shared = *reinterpret_cast<PingpongShared<Config>*>(hidden + p.panels * Config::TileA::bytes);
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
  const ChannelTiles own(split);
  if (warp_index() < kWarpgroup / 32) {
    setmaxnreg_dec<40>();
    if (warp_index() == 0) {
      if (elect_one()) produce<Config>(shared, hidden, maps, p, own);
    } else {
      const int64_t ctas = int64_t{gridDim.x} * gridDim.y, cta = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
      copy_states_of_empty_sequences<Config::W>(p.sequences, p.states, p.D, cta * 3 + warp_index() - 1, ctas * 3);
    }
  } else {
    setmaxnreg_inc<232>();
    consume<Config>(shared, hidden, p, own);
  }
  __syncwarp();
  cluster_sync();  // a CTA must not exit while its peer may still write to its shared memory or arrive on its barriers
}

// ---- Host
// The split that takes the fewest waves of CTAs, one to a multiprocessor. A CTA more for a token tile loads its hidden
// once more, which takes about as long as two tiles of channels.
inline ChannelSplit choose_channel_split(int64_t token_tiles, int tiles, int multiprocessors) {
  ChannelSplit best{.tiles = tiles, .per_cta = tiles};
  int64_t least = INT64_MAX;
  for (int per_cta = tiles; per_cta >= 1; --per_cta) {
    const int ctas = (tiles + per_cta - 1) / per_cta;
    const int64_t waves = (token_tiles * ctas + multiprocessors - 1) / multiprocessors, cost = waves * (per_cta + 2);
    if (cost < least) least = cost, best.per_cta = per_cta;
    if (waves > 1 && ctas > 8 * multiprocessors) break;
  }
  return best;
}

template <class Config>
void launch_pingpong(const DynamicConvCall& call, cudaStream_t stream) {
  constexpr int pair = Config::M * Config::cluster;  // tokens of a cluster
  const int64_t token_tiles = (call.sequences.tokens + pair - 1) / pair * Config::cluster;
  const int tiles = static_cast<int>((call.in.D + Config::channels - 1) / Config::channels);
  const ChannelSplit split = choose_channel_split(token_tiles, tiles, current_device_properties().multiprocessors);
  const DynamicConvArguments p = call.arguments<typename Config::Tile>();
  const LaunchShape shape{
      .grid =
          dim3(static_cast<unsigned>(token_tiles), static_cast<unsigned>((tiles + split.per_cta - 1) / split.per_cta)),
      .threads = Config::threads,
      .shared_bytes = p.panels * Config::TileA::bytes + static_cast<int>(sizeof(PingpongShared<Config>)),
      .cluster = Config::cluster,
      .programmatic = true,
  };
  launch(call.op, shape, stream, pingpong_dynamic_conv_kernel<Config>,
         call.maps<typename Config::Tile>(Config::cluster), p, split);
}

}  // namespace jet::hopper
