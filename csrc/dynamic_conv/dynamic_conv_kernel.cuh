// The dynamic convolution as one GEMM with an epilogue: kernels [tokens, D*W] = hidden weight^T are made tile by tile in registers,
// met by the inputs there, and forgotten. docs/dynamic_conv.md has the data sheet.
//
// A CTA keeps 128 tokens of `hidden` in shared memory and walks over tiles of 32 channels. Warpgroup 0 loads; warpgroups 1 and 2
// take tiles in turns, so that one's epilogue runs under the other's tensor-core work. A cluster of 2 CTAs, neighbours in tokens,
// shares the weights: each loads half of a stage for both.
//
// Which row of the weight is column n of a tile: n = ((j W + w) 4 + c) 2 + e is tap w of channel 8 c + 2 j + e. The tensor map does
// that permutation. As thread t of a warp holds the columns 8 i + 2 (t % 4) + {0, 1} of an accumulator, it has all taps of the 8
// consecutive channels 8 (t % 4) .. + 7: the convolution needs no shuffle, and x and y are accessed 16 bytes at a time.
#pragma once

#include "csrc/dynamic_conv/conv_window.cuh"
#include "csrc/dynamic_conv/dynamic_conv_launch.cuh"
#include "csrc/hopper/cluster.h"
#include "csrc/hopper/device.h"
#include "csrc/hopper/launch.h"
#include "csrc/hopper/pipeline.h"
#include "csrc/hopper/tensor_map.h"
#include "csrc/hopper/wgmma.h"

namespace jet::hopper {

template <class Element_, int W_, int cluster_, bool resident_>
struct DynamicConvConfig {
  using Element = Element_;
  static constexpr int W = W_;
  static constexpr int cluster = cluster_;
  static constexpr bool resident = resident_;  // all of hidden's tile stays; else it comes with every stage (large R)
  static constexpr int M = 128;                // tokens: two m64 instructions per warpgroup share an operand B
  static constexpr int channels = 32;          // of a tile: 4 threads x 8
  static constexpr int N = channels * W;       // columns of the GEMM: at W = 4, 128 accumulator registers for 128 tokens
  static constexpr int K = 64;                 // of a stage: 128 bytes, the widest swizzle
  static constexpr int stages = 5;             // what R = 512 leaves room for
  static constexpr int consumers = 2;
  static constexpr int threads = kWarpgroup * (1 + consumers);
  using TileA = OperandTile<Element, Swizzle::b128, Major::k, M, K>;
  using TileB = OperandTile<Element, Swizzle::b128, Major::k, N, K>;
  using Mma = Wgmma<Element, N>;
  static constexpr int stage_bytes = TileB::bytes + (resident ? 0 : TileA::bytes);
  static constexpr int x_rows = M + W - 1;
  static constexpr int x_bytes = x_rows * channels * 2;
};

template <class Config>
struct DynamicConvShared {
  struct Stage {
    alignas(kTileAlign) char b[Config::TileB::bytes];
    alignas(kTileAlign) char a[Config::resident ? 1 : Config::TileA::bytes];
  };
  struct ResidentStage {
    alignas(kTileAlign) char b[Config::TileB::bytes];
  };
  std::conditional_t<Config::resident, ResidentStage, Stage> stage[Config::stages];
  alignas(128) char x[Config::consumers][(Config::x_bytes + 127) / 128 * 128];  // [M + W - 1, 32]: row i is token m0 - (W-1) + i
  alignas(16) float bias[Config::consumers][Config::N + 16];  // bias_at
  TokenPlace places[Config::M];
  Ring<Config::stages> ring;
  Event hidden_loaded, x_loaded[Config::consumers], x_read[Config::consumers];
  // All warps of the other consumer have seen its last stage arrive: this one's stages are the next of the ring. All, because a
  // warp that lags behind would miss its own turn when the next one comes.
  Event turn[Config::consumers];
};
// With R = 512 and W = 4: everything there is.
static_assert(8 * 128 * 128 + sizeof(DynamicConvShared<DynamicConvConfig<bf16, 4, 2, true>>) <= 227 * 1024);

// Where the bias of column (d - d0) W + w lies: the 8 channels of each of 4 threads begin in other banks.
template <class Config>
__device__ constexpr int bias_at(int column) {
  return column + column / (8 * Config::W) * 4;
}

struct DynamicConvMaps {
  CUtensorMap hidden, weight, x;
};

// The channel tiles of this CTA.
struct DynamicConvPart {
  int first, count;
  template <class Arguments>
  __device__ explicit DynamicConvPart(const Arguments& p) {
    first = blockIdx.y * p.per_part;
    count = min(p.per_part, p.tiles - first);
  }
};

template <class Config>
__device__ void load_weights(char* stage, const CUtensorMap& map, Event& filled, int tile, int panel) {
  const int k = panel * Config::K, c = tile * 4;
  if constexpr (Config::cluster == 1) {
    load(stage, map, filled, Reuse::often, k, 0, c, 0, 0);
  } else {
    const int half = cluster_rank();  // of j
    load_multicast(stage + half * Config::TileB::bytes / 2, map, filled, 0b11, Reuse::often, k, 0, c, 0, 2 * half);
  }
}

template <class Config>
__device__ void produce(DynamicConvShared<Config>& shared, char* hidden, const DynamicConvMaps& maps, const DynamicConvArguments& p) {
  const int m0 = blockIdx.x * Config::M;
  const DynamicConvPart part(p);
  if constexpr (Config::resident) {
    shared.hidden_loaded.arrive_and_expect(p.panels * Config::TileA::bytes);
    for (int panel = 0; panel < p.panels; ++panel)
      load(hidden + panel * Config::TileA::bytes, maps.hidden, shared.hidden_loaded, Reuse::normal, panel * Config::K, m0);
  }
  Producer<Config::stages> ring(shared.ring);
  Cursor<Config::consumers> x(Parity::past());
  for (int i = 0; i < part.count; ++i, x.advance()) {
    for (int panel = 0; panel < p.panels; ++panel, ring.advance()) {
      auto& stage = shared.stage[ring.acquire(Config::stage_bytes)];
      if constexpr (!Config::resident) load(stage.a, maps.hidden, ring.filled(), Reuse::normal, panel * Config::K, m0);
      load_weights<Config>(stage.b, maps.weight, ring.filled(), part.first + i, panel);
    }
    // Needed last, so asked for last: the wait for the epilogue two tiles ago must not hold up the weights.
    shared.x_read[x.stage].wait(x.parity);
    shared.x_loaded[x.stage].arrive_and_expect(Config::x_bytes);
    load(shared.x[x.stage], maps.x, shared.x_loaded[x.stage], Reuse::normal, (part.first + i) * Config::channels, m0 - (Config::W - 1));
  }
}

// kernel[128 tokens, N] of one tile
template <class Config>
__device__ void generate(typename Config::Mma::Accumulator (&kernel)[2], DynamicConvShared<Config>& shared, const char* hidden,
                         Consumer<Config::stages>& ring, int panels, int consumer, int thread) {
  using Mma = typename Config::Mma;
  int previous = 0;
  for (int panel = 0; panel < panels; ++panel, ring.advance()) {
    const int stage = ring.wait();
    if (panel == panels - 1 && thread % 32 == 0) shared.turn[1 - consumer].arrive();
    const char* a_tile = hidden + panel * Config::TileA::bytes;
    if constexpr (!Config::resident) a_tile = shared.stage[stage].a;
    const Operand<typename Config::Element, Swizzle::b128, Major::k, Config::M, Config::K> a(a_tile);
    const Operand<typename Config::Element, Swizzle::b128, Major::k, Config::N, Config::K> b(shared.stage[stage].b);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Config::K; k += Mma::K)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        Mma::ss(kernel[half], a.at(64 * half, k), b.at(0, k), panel > 0 || k > 0);  // kernel += hidden weightᵀ   [64, N], k16
    wgmma_commit();
    if (panel > 0) {  // the stage before this one has been read when only this one's products are left
      wgmma_wait<1>();
      ring.template release_all<Config::cluster>(previous, thread);
    }
    previous = stage;
  }
  wgmma_wait<0>();
  wgmma_touch(kernel[0]);
  wgmma_touch(kernel[1]);
  ring.template release_all<Config::cluster>(previous, thread);
}

// One row of the tile: token m, its kernels in `kernel` (registers of half `upper`), 8 channels from d.
template <class Config>
__device__ void convolve_row(const typename Config::Mma::Accumulator& kernel, const float (&bias)[8][Config::W], const char* x_tile,
                             const DynamicConvArguments& p, const TokenPlace& place, int64_t m, int row, int64_t d, int upper) {
  constexpr int W = Config::W;
  using Element = typename Config::Element;
  uint4 x[W];
#pragma unroll
  for (int w = 0; w < W; ++w) x[w] = *reinterpret_cast<const uint4*>(x_tile + ((row + w) * Config::channels + threadIdx.x % 4 * 8) * 2);
  if (place.position < W - 1) begin_of_sequence(x, p.states, place, d);
  float z[8] = {};
#pragma unroll
  for (int w = 0; w < W; ++w) {
    float input[8];
    unpack_8<Element>(input, x[w]);
#pragma unroll
    for (int c = 0; c < 8; ++c)
      z[c] += (kernel[(c / 2 * W + w) * 4 + upper * 2 + c % 2] + bias[c][w]) * input[c];  // z += kernel[t, d, w] x[t - (W-1) + w, d]
  }
  uint4 y = activate_8<Element>(z, p.silu);
  if (place.outside) y = make_uint4(0, 0, 0, 0);
  __stcg(reinterpret_cast<uint4*>(static_cast<Element*>(p.y) + m * p.D + d), y);
  if (place.last && !place.outside) end_of_sequence(x, p.states, place, d);
}

template <class Config>
__device__ void convolve(const typename Config::Mma::Accumulator (&kernel)[2], DynamicConvShared<Config>& shared,
                         const DynamicConvArguments& p, int tile, int consumer, int thread) {
  constexpr int W = Config::W;
  const int64_t d = int64_t{tile} * Config::channels + thread % 4 * 8, m0 = int64_t{blockIdx.x} * Config::M;
  float bias[8][W];
#pragma unroll
  for (int i = 0; i < 2 * W; ++i) {
    const float4 four = reinterpret_cast<const float4*>(shared.bias[consumer] + bias_at<Config>(thread % 4 * 8 * W))[i];
    bias[4 * i / W][4 * i % W] = four.x, bias[(4 * i + 1) / W][(4 * i + 1) % W] = four.y;
    bias[(4 * i + 2) / W][(4 * i + 2) % W] = four.z, bias[(4 * i + 3) / W][(4 * i + 3) % W] = four.w;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int half = i / 2, upper = i % 2, row = 64 * half + accumulator_row(thread, 2 * upper);
    if (m0 + row < p.sequences.tokens && d < p.D)
      convolve_row<Config>(kernel[half], bias, shared.x[consumer], p, shared.places[row], m0 + row, row, d, upper);
  }
}

template <class Config>
__device__ void consume(DynamicConvShared<Config>& shared, const char* hidden, const DynamicConvArguments& p) {
  const int thread = threadIdx.x % kWarpgroup, consumer = threadIdx.x / kWarpgroup - 1;
  const int all = 1, mine = 2 + consumer;  // hardware barriers: of both consumers, of this one
  if (consumer == 0) {
    const int64_t m = int64_t{blockIdx.x} * Config::M + thread;
    if (m < p.sequences.tokens) shared.places[thread] = place_of_token<Config::W>(p.sequences, m);
  }
  sync_threads(all, Config::consumers * kWarpgroup);
  const DynamicConvPart part(p);
  Consumer<Config::stages> ring(shared.ring);
  Parity x = Parity::first(), turn = consumer == 0 ? Parity::past() : Parity::first();
  if (Config::resident && part.count > consumer) shared.hidden_loaded.wait(Parity::first());
  if (consumer == 1) ring.skip(p.panels);
  for (int i = consumer; i < part.count; i += Config::consumers, x.next(), turn.next()) {
    const int64_t column = int64_t{part.first + i} * Config::N + thread;
    float bias = 0;
    if (p.bias != nullptr && thread < Config::N && column < p.D * Config::W)
      bias = load_as_float(p.bias, std::is_same_v<typename Config::Element, bf16> ? Dtype::bf16 : Dtype::f16, column);
    typename Config::Mma::Accumulator kernel[2];
    // A barrier tells odd from even turns only: without this wait, stages of the turn before would be taken for this one's.
    shared.turn[consumer].wait(turn);
    generate<Config>(kernel, shared, hidden, ring, p.panels, consumer, thread);
    ring.skip(p.panels);  // the other consumer's tile
    if (thread < Config::N) shared.bias[consumer][bias_at<Config>(thread)] = bias;
    shared.x_loaded[consumer].wait(x);
    sync_threads(mine, kWarpgroup);
    convolve<Config>(kernel, shared, p, part.first + i, consumer, thread);
    sync_threads(mine, kWarpgroup);
    if (thread == 0) shared.x_read[consumer].arrive();
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1)
    dynamic_conv_kernel(const __grid_constant__ DynamicConvMaps maps, const __grid_constant__ DynamicConvArguments p) {
  extern __shared__ __align__(kTileAlign) char hidden[];  // [panels][128 tokens, 64] when resident
  auto& shared = *reinterpret_cast<DynamicConvShared<Config>*>(hidden + (Config::resident ? p.panels * Config::TileA::bytes : 0));
  if (threadIdx.x == 0) {
    shared.ring.init(Config::cluster);  // a stage is read by one warpgroup of each CTA
    shared.hidden_loaded.init(1);
    for (int i = 0; i < Config::consumers; ++i) shared.x_loaded[i].init(1), shared.x_read[i].init(1), shared.turn[i].init(kWarpgroup / 32);
    publish_inits();
  }
  if constexpr (Config::cluster > 1)
    cluster_sync();
  else
    __syncthreads();
  if (warp_index() < kWarpgroup / 32) {
    give_registers_back<40>();
    if (warp_index() == 0) {
      if (elected()) produce<Config>(shared, hidden, maps, p);
    } else if (p.sequences.cu_seqlens != nullptr) {
      const int64_t warps = int64_t{gridDim.x} * gridDim.y * 3;
      for (int64_t n = (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * 3 + warp_index() - 1; n < p.sequences.N; n += warps)
        if (sequence_bound(p.sequences, n) == sequence_bound(p.sequences, n + 1)) pass_state_on<Config::W>(p.states, n, p.D);
    }
  } else {
    take_registers<232>();
    consume<Config>(shared, hidden, p);
  }
  __syncwarp();
  // A CTA must not exit while its peer may still write to its shared memory or arrive on its barriers.
  if constexpr (Config::cluster > 1) cluster_sync();
}

// ---- Host ---------------------------------------------------------------------------------------------------------------
struct DynamicConvTiles {
  int cluster;   // CTAs that share the weights
  int parts;     // into which the channels are cut
  int per_part;  // channel tiles of a CTA
};

// One CTA fits a multiprocessor. A cut costs another load of hidden's tile, about as long as two channel tiles take.
inline DynamicConvTiles choose_dynamic_conv_tiles(int64_t token_tiles, int tiles, int multiprocessors) {
  const int cluster = token_tiles > 1 ? 2 : 1;
  const int64_t columns = (token_tiles + cluster - 1) / cluster * cluster;
  DynamicConvTiles best{cluster, 1, tiles};
  int64_t least = INT64_MAX;
  for (int per_part = tiles; per_part >= 1; --per_part) {
    const int parts = (tiles + per_part - 1) / per_part;
    const int64_t waves = (columns * parts + multiprocessors - 1) / multiprocessors, cost = waves * (per_part + 2);
    if (cost < least) least = cost, best = {cluster, parts, per_part};
    if (waves > 1 && parts > 8 * multiprocessors) break;
  }
  return best;
}

// The generator's weight [D*W, R], in the column order of the file's first lines.
template <class Config>
CUtensorMap make_weight_map(const void* weight, Dtype dtype, int64_t D, int64_t R) {
  const uint64_t W = Config::W, row = R * 2, channels = D;
  //                                              r             e                  c                w        j
  return make_tensor_map({"weight", weight, dtype, 5,
                          {static_cast<uint64_t>(R), 2, channels / 8, W, 4},
                          {0, W * row, 8 * W * row, row, 2 * W * row},
                          {Config::K, 2, 4, Config::W, 4 / Config::cluster},
                          Swizzle::b128});
}

template <class Config>
void launch_dynamic_conv(const DynamicConvLaunch& l, const DynamicConvTiles& tiles, cudaStream_t stream) {
  const int64_t M = l.arguments.sequences.tokens;
  // One row's stride means nothing to its tensor, but a tensor map checks it.
  const int64_t x_stride = M == 1 ? l.D : l.x_stride, hidden_stride = M == 1 ? l.R : l.hidden_stride;
  DynamicConvArguments p = l.arguments;
  p.panels = static_cast<int>((l.R + Config::K - 1) / Config::K);
  p.tiles = static_cast<int>((l.D + Config::channels - 1) / Config::channels);
  p.per_part = tiles.per_part;
  const DynamicConvMaps maps{
      make_operand_map<typename Config::TileA>("hidden", l.hidden, l.dtype, M, l.R, hidden_stride),
      make_weight_map<Config>(l.weight, l.dtype, l.D, l.R),
      make_tensor_map({"x", l.x, l.dtype, 2, {static_cast<uint64_t>(l.D), static_cast<uint64_t>(M)}, {0, static_cast<uint64_t>(x_stride) * 2},
                       {Config::channels, Config::x_rows}, Swizzle::none})};
  const int64_t token_tiles = (M + Config::M - 1) / Config::M, columns = (token_tiles + Config::cluster - 1) / Config::cluster * Config::cluster;
  const int shared_bytes = (Config::resident ? p.panels * Config::TileA::bytes : 0) + static_cast<int>(sizeof(DynamicConvShared<Config>));
  launch(l.op, {dim3(static_cast<unsigned>(columns), static_cast<unsigned>(tiles.parts)), Config::threads, shared_bytes, Config::cluster}, stream,
         dynamic_conv_kernel<Config>, maps, p);
}

constexpr int64_t kResidentR = 512;  // the largest R whose tile of hidden fits beside five stages

template <class Element, int W>
void launch_dynamic_conv(const DynamicConvLaunch& l, cudaStream_t stream) {
  const int64_t token_tiles = (l.arguments.sequences.tokens + 127) / 128;
  const int tiles = static_cast<int>((l.D + 31) / 32);
  const DynamicConvTiles chosen = choose_dynamic_conv_tiles(token_tiles, tiles, current_device_facts().multiprocessors);
  if (l.R > kResidentR) return launch_dynamic_conv<DynamicConvConfig<Element, W, 1, false>>(l, chosen, stream);
  if (chosen.cluster == 2) return launch_dynamic_conv<DynamicConvConfig<Element, W, 2, true>>(l, chosen, stream);
  launch_dynamic_conv<DynamicConvConfig<Element, W, 1, true>>(l, chosen, stream);
}

template <class Element>
void launch_dynamic_conv_of(const DynamicConvLaunch& l, int64_t W, cudaStream_t stream) {
  if (W == 2) return launch_dynamic_conv<Element, 2>(l, stream);
  if (W == 3) return launch_dynamic_conv<Element, 3>(l, stream);
  launch_dynamic_conv<Element, 4>(l, stream);
}

}  // namespace jet::hopper
