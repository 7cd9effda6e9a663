// Backward, third pass: dweight [D*W, R] = dtaps^T hidden and dbias, the column sums of dtaps. dtaps^T is made in
// registers, as the A operand of wgmma: ldmatrix transposes dz and x, of which tap w reads x w - (W-1) tokens further.
//
// A warpgroup has the taps of 16 channels (32 at W = 2), a warp those of one tap of 16 channels; all warpgroups of a
// CTA share a tile of hidden [64 tokens, N columns], the B operand as it lies in memory (MN-major). The cluster is 2
// CTAs, neighbours in channels, that share it too. Where rows and columns alone do not fill the device, tokens are
// split: then sums go to the workspace, in fp32, and reduce_kernel adds them in the order of the tokens.
#pragma once

#include "csrc/dynamic_conv/gemm/backward_hidden.cuh"
#include "csrc/hopper/mma.h"

namespace jet::hopper {

struct WeightGradientArguments {
  ConvSequences sequences;
  ConvStates states;
  int64_t D, R;
  int tiles, tiles_per_split;      // of 64 tokens
  const GradientPlace* places;     // [tokens]
  void *dweight, *dbias;           // [D*W, R], [D*W]
  float *weight_sums, *bias_sums;  // [splits, D*W, R], [splits, D*W]; null: there is one split
};

struct WeightGradientMaps {
  CUtensorMap hidden, x, dz;
};

template <class Element_, int W_, int N_>
struct WeightGradientConfig {
  using Element = Element_;
  static constexpr int W = W_, N = N_;
  static constexpr int K = 64;  // tokens of a stage
  static constexpr int steps = K / 16;
  static constexpr int channels = W == 2 ? 32 : 16;  // of a warpgroup. At W = 3 a warp has no tap
  // 3 warpgroups where accumulators leave the registers: at D*W = 12288 and R = 384 that is 128 CTAs.
  static constexpr int consumers = N > 192 ? 2 : 3;
  static constexpr int registers = consumers == 2 ? 232 : 160;  // of a consumer thread
  static constexpr int producer_registers = consumers == 2 ? 40 : 32;
  static constexpr int cluster = 2;
  static constexpr int threads = kWarpgroup * (1 + consumers);
  using TileB = OperandTile<Element, Swizzle::b128, Major::mn, N, K>;
  using B = MatrixDescriptor<TileB>;
  using Mma = Wgmma<Element, N, Major::k, Major::mn>;
  static constexpr int row_bytes = channels * 2;
  static constexpr Swizzle swizzle = W == 2 ? Swizzle::b64 : Swizzle::b32;  // a row of x is a row of the swizzle
  static constexpr int x_rows = K + W - 1;                                  // row i is token t0 - (W-1) + i
  static constexpr int x_bytes = x_rows * row_bytes, dz_bytes = K * row_bytes;
  static constexpr int stage_bytes = TileB::bytes + consumers * (x_bytes + dz_bytes);
  static constexpr int stages = 5;
};

template <class Config>
struct WeightGradientShared {
  struct Stage {
    alignas(kTileAlign) char b[Config::TileB::bytes];
    alignas(512) char dz[Config::consumers][Config::dz_bytes];
    struct alignas(512) {
      char rows[Config::x_bytes];
    } x[Config::consumers];
  };
  Stage stage[Config::stages];
  Ring<Config::stages> ring;
};
static_assert(sizeof(WeightGradientShared<WeightGradientConfig<bf16, 4, 256>>) <= kMaxSharedMemoryPerBlock);
static_assert(sizeof(WeightGradientShared<WeightGradientConfig<bf16, 4, 192>>) <= kMaxSharedMemoryPerBlock);

// The tiles of tokens of this CTA.
struct TokenTiles {
  int first, end;
  __device__ explicit TokenTiles(const WeightGradientArguments& p)
      : first(blockIdx.z * p.tiles_per_split), end(min(first + p.tiles_per_split, p.tiles)) {}
};

template <class Config>
__device__ void produce(WeightGradientShared<Config>& shared, const WeightGradientMaps& maps,
                        const WeightGradientArguments& p) {
  const int r0 = blockIdx.y * Config::N, rank = cluster_rank();
  const int d0 = blockIdx.x * Config::consumers * Config::channels;
  const TokenTiles tiles(p);
  constexpr int part = Config::K / Config::cluster;  // tokens of hidden that this CTA loads
  Producer<Config::stages> ring(shared.ring);
#pragma unroll 1
  for (int tile = tiles.first; tile < tiles.end; ++tile, ring.advance()) {
    auto& stage = shared.stage[ring.acquire(Config::stage_bytes)];
    const int t0 = tile * Config::K;
#pragma unroll 1
    for (int i = 0; i < Config::consumers; ++i) {
      tma_load(stage.dz[i], maps.dz, ring.full(), CacheHint::evict_normal, d0 + i * Config::channels, t0);
      tma_load(stage.x[i].rows, maps.x, ring.full(), CacheHint::evict_normal, d0 + i * Config::channels,
               t0 - (Config::W - 1));
    }
#pragma unroll 1
    for (int panel = 0; panel < Config::TileB::panels; ++panel)
      tma_load_multicast(stage.b + panel * Config::TileB::panel_bytes + rank * part * Config::TileB::row_bytes,
                         maps.hidden, ring.full(), 0b11, CacheHint::evict_normal,
                         r0 + panel * Config::TileB::panel_width, t0 + rank * part);
  }
}

// What a warp has: rows of dweight, all of one tap.
template <class Config>
struct WeightRows {
  int tap, block;  // of 16 channels of the warpgroup
  bool none;
  int d;            // of this thread's first row; the other is 8 channels further
  int dz_at, x_at;  // where this lane's row for ldmatrix begins in a stage, of step 0

  __device__ WeightRows(int thread, int consumer) {
    const int warp = thread / 32, lane = thread % 32;
    none = Config::W == 3 && warp == 3;
    tap = none ? 0 : warp % Config::W;
    block = Config::W == 2 ? warp / 2 : 0;
    d = static_cast<int>(blockIdx.x * Config::consumers + consumer) * Config::channels + 16 * block + lane / 4;
    const int k = ldmatrix_trans_k(lane), m = 16 * block + ldmatrix_trans_m(lane);
    dz_at = swizzled(Config::swizzle, k * Config::row_bytes + 2 * m);
    x_at = swizzled(Config::swizzle, (k + tap) * Config::row_bytes + 2 * m);
  }
};

template <class Config>
using WeightFragments = uint32_t[Config::steps][4];

// dtaps^T again where a token is special: what is not in the tile comes from a state, and tokens outside of all
// sequences count for nothing.
template <class Config>
__device__ void mend_dtaps(WeightFragments<Config>& dtaps, const WeightGradientShared<Config>& shared, int stage,
                           const WeightGradientArguments& p, const WeightRows<Config>& rows, uint64_t special, int tile,
                           int consumer) {
#pragma unroll
  for (int step = 0; step < Config::steps; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int k = step * 16 + a_fragment_k(threadIdx.x, i, e);
        if ((special >> k & 1) == 0) continue;
        const GradientPlace place = load_place(p.places + int64_t{tile} * Config::K + k);
        const int number = place.position + rows.tap;  // of the inputs before the sequence
        if (!place.outside && number >= Config::W - 1) continue;
        const int channel = rows.d + i % 2 * 8;
        uint32_t value = 0;
        if (!place.outside && p.states.in != nullptr && channel < p.D)
          value = static_cast<const uint16_t*>(
              p.states.in)[place.row * p.states.stride + channel * (Config::W - 1) + number];
        const int at = k * Config::row_bytes + 2 * (16 * rows.block + threadIdx.x % 32 / 4 + i % 2 * 8);
        const uint32_t dz =
            *reinterpret_cast<const uint16_t*>(shared.stage[stage].dz[consumer] + swizzled(Config::swizzle, at));
        const uint32_t product = multiply_pairs<typename Config::Element>(dz, value) & 0xffff;
        uint32_t& both = dtaps[step][i];
        both = e == 0 ? (both & 0xffff0000u) | product : (both & 0xffffu) | product << 16;
      }
}

// dtaps^T of one tile, and dbias += its sums. special: of each token of the tile, whether mend_dtaps is for it.
template <class Config>
__device__ void form_dtaps(WeightFragments<Config>& dtaps, float (&dbias)[2],
                           const WeightGradientShared<Config>& shared, int stage, const WeightGradientArguments& p,
                           const WeightRows<Config>& rows, uint64_t special, int tile, int consumer, bool sums) {
  using Element = typename Config::Element;
#pragma unroll
  for (int step = 0; step < Config::steps; ++step) {
    uint32_t dz[4], x[4];
    ldmatrix_x4_trans(dz, shared.stage[stage].dz[consumer] + rows.dz_at + step * 16 * Config::row_bytes);
    ldmatrix_x4_trans(x, shared.stage[stage].x[consumer].rows + rows.x_at + step * 16 * Config::row_bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) dtaps[step][i] = multiply_pairs<Element>(dz[i], x[i]);
  }
  if (special != 0) mend_dtaps<Config>(dtaps, shared, stage, p, rows, special, tile, consumer);
  if (!sums) return;
#pragma unroll
  for (int step = 0; step < Config::steps; ++step)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack<Element>(dtaps[step][i]);
      dbias[i % 2] += pair.x + pair.y;  // dbias[d, w] += dtaps[t, d, w]
    }
}

// The tokens of a tile that are `special`, as bits, the same in all lanes. Asked for a tile ahead, as they come from
// memory.
template <class Config>
class SpecialTokens {
 public:
  __device__ void ask(const WeightGradientArguments& p, int tile, int end) {
    const int64_t t = int64_t{tile} * Config::K + threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      word_[i] = Config::W - 1;  // an ordinary token
      if (tile < end && t + 32 * i < p.sequences.tokens) word_[i] = load_place_flags(p.places + t + 32 * i);
    }
  }
  __device__ uint64_t answer() const {
    const uint64_t low = __ballot_sync(0xffffffffu, is_special<Config::W>(word_[0])),
                   high = __ballot_sync(0xffffffffu, is_special<Config::W>(word_[1]));
    return low | high << 32;
  }

 private:
  uint32_t word_[2];
};

// dweight [64, N] += dtaps^T hidden of one tile.
template <class Config>
__device__ void multiply_tokens(typename Config::Mma::Accumulator& dweight, WeightFragments<Config>& dtaps,
                                const WeightGradientShared<Config>& shared, int stage, bool first_tile) {
  using Mma = typename Config::Mma;
  const typename Config::B b(shared.stage[stage].b);
  wgmma_fence(dtaps);
#pragma unroll
  for (int step = 0; step < Config::steps; ++step)
    // dweight += dtapsᵀ hidden   [64, N], k16
    Mma::rs(dweight, dtaps[step], b.at(0, step * Mma::K), !first_tile || step > 0);
  wgmma_commit_group();
}

template <class Config>
__device__ void store_weight_gradient(const typename Config::Mma::Accumulator& dweight, float (&dbias)[2],
                                      const WeightGradientArguments& p, const WeightRows<Config>& rows) {
  using Element = typename Config::Element;
  const int64_t r0 = int64_t{blockIdx.y} * Config::N, all = p.D * Config::W;
  int64_t row[2];
  bool there[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    row[i] = int64_t{rows.d + 8 * i} * Config::W + rows.tap;
    there[i] = !rows.none && rows.d + 8 * i < p.D;
    dbias[i] += __shfl_xor_sync(0xffffffffu, dbias[i], 1);
    dbias[i] += __shfl_xor_sync(0xffffffffu, dbias[i], 2);
    if (!there[i] || blockIdx.y != 0 || threadIdx.x % 4 != 0) continue;
    if (p.bias_sums != nullptr)
      p.bias_sums[blockIdx.z * all + row[i]] = dbias[i];
    else
      static_cast<uint16_t*>(p.dbias)[row[i]] = static_cast<uint16_t>(pack<Element>(dbias[i], 0));
  }
  if (p.weight_sums == nullptr)
    return store_accumulator<Element>(dweight, r0, p.R, [&](int i) -> void* {
      return there[i] ? static_cast<Element*>(p.dweight) + row[i] * p.R : nullptr;
    });
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (!there[i]) continue;
    float* const to = p.weight_sums + (blockIdx.z * all + row[i]) * p.R;
#pragma unroll
    for (int g = 0; g < Config::Mma::registers / 4; ++g) {
      const int64_t r = r0 + g * 8 + threadIdx.x % 4 * 2;
      if (r < p.R) *reinterpret_cast<float2*>(to + r) = make_float2(dweight[4 * g + 2 * i], dweight[4 * g + 2 * i + 1]);
    }
  }
}

template <class Config>
__device__ void consume(WeightGradientShared<Config>& shared, const WeightGradientArguments& p) {
  const int thread = threadIdx.x % kWarpgroup, consumer = threadIdx.x / kWarpgroup - 1;
  const WeightRows<Config> rows(thread, consumer);
  const TokenTiles tiles(p);
  const bool sums = blockIdx.y == 0;
  typename Config::Mma::Accumulator dweight;
  float dbias[2] = {};
  WeightFragments<Config> even, odd;
  Consumer<Config::stages> ring(shared.ring);
  SpecialTokens<Config> special;
  special.ask(p, tiles.first, tiles.end);
  uint64_t bits = special.answer();
  special.ask(p, tiles.first + 1, tiles.end);
  int stage = ring.wait();
  ring.advance();
  form_dtaps<Config>(even, dbias, shared, stage, p, rows, bits, tiles.first, consumer, sums);
  // One tile: its products, and meanwhile the operand of the next.
  const auto step = [&](WeightFragments<Config>& now, WeightFragments<Config>& next, int tile) {
    multiply_tokens<Config>(dweight, now, shared, stage, tile == tiles.first);
    int following = 0;
    if (tile + 1 < tiles.end) {
      bits = special.answer();
      following = ring.wait();
      ring.advance();
      form_dtaps<Config>(next, dbias, shared, following, p, rows, bits, tile + 1, consumer, sums);
      compiler_fence();
      special.ask(p, tile + 2, tiles.end);
    }
    wgmma_wait_group<0>();
    wgmma_fence_operand(dweight);
    wgmma_hold_operand(now);
    ring.template release_all<Config::cluster>(stage, thread);
    stage = following;
  };
#pragma unroll 1
  for (int tile = tiles.first; tile < tiles.end; tile += 2) {
    step(even, odd, tile);
    if (tile + 1 == tiles.end) break;
    step(odd, even, tile + 1);
  }
  store_weight_gradient<Config>(dweight, dbias, p, rows);
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1)
    weight_gradient_kernel(const __grid_constant__ WeightGradientMaps maps,
                           const __grid_constant__ WeightGradientArguments p) {
  extern __shared__ __align__(kTileAlign) char memory[];
  auto& shared = *reinterpret_cast<WeightGradientShared<Config>*>(memory);
  if (threadIdx.x == 0) {
    prefetch_tensormap(maps.hidden), prefetch_tensormap(maps.x), prefetch_tensormap(maps.dz);
    shared.ring.init(Config::consumers * Config::cluster);
    fence_mbarrier_init();
  }
  cluster_sync();
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  if (warp_index() < kWarpgroup / 32) {
    setmaxnreg_dec<Config::producer_registers>();
    if (warp_index() == 0 && elect_one()) produce<Config>(shared, maps, p);
  } else {
    setmaxnreg_inc<Config::registers>();
    consume<Config>(shared, p);
  }
  __syncwarp();
  cluster_sync();  // a CTA must not exit while its peer may still write to its shared memory or arrive on its barriers
}

constexpr int kReduceThreads = 256;

struct ReduceArguments {
  const float* sums;  // [splits, count]
  int splits;
  int64_t count;  // a multiple of 8
  void* out;      // [count]
};

// out = the sum over splits, in their order; 8 elements a thread.
template <class Element>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const __grid_constant__ ReduceArguments weight, const __grid_constant__ ReduceArguments bias) {
  griddepcontrol_wait();
  const int64_t thread = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x, weights = weight.count / 8;
  const ReduceArguments& p = thread < weights ? weight : bias;
  const int64_t at = (thread < weights ? thread : thread - weights) * 8;
  if (at >= p.count) return;
  float sum[8] = {};
#pragma unroll 2
  for (int split = 0; split < p.splits; ++split) {
    const auto* const from = reinterpret_cast<const float4*>(p.sums + split * p.count + at);
    const float4 a = __ldcg(from), b = __ldcg(from + 1);
    sum[0] += a.x, sum[1] += a.y, sum[2] += a.z, sum[3] += a.w;
    sum[4] += b.x, sum[5] += b.y, sum[6] += b.z, sum[7] += b.w;
  }
  Elements<8> packed;
#pragma unroll
  for (int j = 0; j < 4; ++j) packed.words[j] = pack<Element>(sum[2 * j], sum[2 * j + 1]);
  store_elements(static_cast<Element*>(p.out) + at, packed);
}

}  // namespace jet::hopper
