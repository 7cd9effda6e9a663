// Backward, first pass: the taps again, tile by tile in registers as in the forward's ping-pong kernel, and as their
// epilogue dz, which goes to the workspace, dx and dconv_state.
//
//   taps [tokens, D*W] = hidden weight^T + bias        dz = dy silu'(z)        g[t, w] = dz[t] taps[t, w]
//   dx[q] = ((g[q + W-1, 0] + g[q + W-2, 1]) + ..) + g[q, W-1]
//
// So a sum passes from token to token against their order: u[t, w] = u[t+1, w-1] + g[t, w], dx[q] = u[q, W-1]. What
// flows out of the first token of a sequence, u[., 0 .. W-2], is its dconv_state. A thread has 4 consecutive tokens of
// 8 channels: the rows of hidden are permuted as they are loaded. Between threads the flow passes by shuffles, between
// warps through shared memory. The last W - 1 tokens of a tile lack what flows in; they are the first of the next tile.
#pragma once

#include "csrc/dynamic_conv/gemm/backward_places.cuh"
#include "csrc/dynamic_conv/gemm/pingpong.cuh"

namespace jet::hopper {

struct InputGradientArguments {
  ConvSequences sequences;
  ConvStates states;
  ConvStateGradients gradients;
  int64_t D;
  int panels;  // of 64 along R
  bool silu;
  const void* bias;       // [D*W], or null
  void *dz, *dx;          // [tokens, D]
  GradientPlace* places;  // [tokens]
};

struct InputGradientMaps {
  CUtensorMap hidden, weight, x, dy;

  __device__ void prefetch_all() const {
    prefetch_tensormap(weight);
    prefetch_tensormap(hidden);
    prefetch_tensormap(x);
    prefetch_tensormap(dy);
  }
};

// resident: hidden [128, R] stays in shared memory, R <= kResidentR; else its panels come with those of the weights.
template <class Element, int W, bool resident_>
struct InputGradientConfig : ConvTile<Element, W, 8, 128> {
  using Tile = ConvTile<Element, W, 8, 128>;
  static constexpr bool resident = resident_;
  static constexpr int own = Tile::M - (W - 1);  // tokens that no other tile has
  static constexpr int cluster = 2;
  static constexpr int stages = W == 4 ? 3 : 4;  // what R = 512 leaves room for
  static constexpr int consumers = 2;
  static constexpr int threads = kWarpgroup * (1 + consumers);
  // Tokens of a thread. Boxes have every 4th token: of hidden 8 of them, of x and dy a quarter of the tile. So what a
  // thread reads together with its neighbours, 4 tokens further each, lies in consecutive rows, in different banks.
  static constexpr int step = 4;
  static constexpr int x_box = (Tile::x_rows + step - 1) / step, dy_box = Tile::M / step;  // rows
  static constexpr int x_box_bytes = (x_box * Tile::x_row_bytes + 127) / 128 * 128;
  static constexpr int dy_box_bytes = dy_box * Tile::x_row_bytes;
  static constexpr int input_bytes = step * (x_box + dy_box) * Tile::x_row_bytes;
};

template <class Config>
struct InputGradientShared {
  struct Stage {
    alignas(kTileAlign) char b[Config::TileB::bytes];
    alignas(kTileAlign) char a[Config::resident ? kTileAlign : Config::TileA::bytes];
  };
  struct ResidentStage {
    alignas(kTileAlign) char b[Config::TileB::bytes];
  };
  std::conditional_t<Config::resident, ResidentStage, Stage> stage[Config::stages];
  alignas(128) char x[Config::consumers][Config::step][Config::x_box_bytes];    // [x_rows, 32]
  alignas(128) char dy[Config::consumers][Config::step][Config::dy_box_bytes];  // [128, 32]
  alignas(16) float bias[Config::consumers][Config::bias_size];
  // What flows out of the first token of each warp.
  alignas(16) float flow[Config::consumers][kWarpgroup / 32][Config::W - 1][Config::channels];
  alignas(8) GradientPlace places[Config::M + 1];
  Ring<Config::stages> ring;
  Mbarrier hidden_loaded, x_loaded[Config::consumers], x_read[Config::consumers];
  Mbarrier turn[Config::consumers];  // as in the ping-pong kernel
};
static_assert(kResidentR / 64 * 128 * 128 + sizeof(InputGradientShared<InputGradientConfig<bf16, 4, true>>) <=
              kMaxSharedMemoryPerBlock);
static_assert(sizeof(InputGradientShared<InputGradientConfig<bf16, 4, false>>) <= kMaxSharedMemoryPerBlock);

// One panel of hidden. Token 32 warp + 4 group + i of the tile is row accumulator_row(thread, ..) of accumulator i / 2,
// in its upper half if i is odd: the rows of one i and one warp are 8 consecutive ones in shared memory.
template <class Config>
__device__ void load_hidden_panel(char* to, const CUtensorMap& map, Mbarrier& barrier, int panel, int m0) {
#pragma unroll 1
  for (int warp = 0; warp < kWarpgroup / 32; ++warp)
#pragma unroll
    for (int i = 0; i < Config::step; ++i)
      tma_load(to + (i / 2 * 64 + warp * 16 + i % 2 * 8) * Config::K * 2, map, barrier, CacheHint::evict_normal,
               panel * Config::K, m0 + 32 * warp + i);
}

template <class Config>
__device__ void produce(InputGradientShared<Config>& shared, char* hidden, const InputGradientMaps& maps,
                        const InputGradientArguments& p, const ChannelTiles& own) {
  const int m0 = blockIdx.x * Config::own, half = cluster_rank();  // of a stage's columns: of their j (tile.cuh)
  if constexpr (Config::resident) {
    shared.hidden_loaded.arrive_expect_tx(p.panels * Config::TileA::bytes);
#pragma unroll 1
    for (int panel = 0; panel < p.panels; ++panel)
      load_hidden_panel<Config>(hidden + panel * Config::TileA::bytes, maps.hidden, shared.hidden_loaded, panel, m0);
  }
  Producer<Config::stages> ring(shared.ring);
  PipelineState<Config::consumers> x(PhaseParity::preceding());
  for (int i = 0; i < own.count; ++i, x.advance()) {
    const int tile = own.first + i;
#pragma unroll 1
    for (int panel = 0; panel < p.panels; ++panel, ring.advance()) {
      auto& stage = shared.stage[ring.acquire(Config::TileB::bytes + (Config::resident ? 0 : Config::TileA::bytes))];
      tma_load_multicast(stage.b + half * Config::TileB::bytes / 2, maps.weight, ring.full(), 0b11,
                         CacheHint::evict_last, panel * Config::K, 0, tile * 4, 0, 2 * half);
      if constexpr (!Config::resident) load_hidden_panel<Config>(stage.a, maps.hidden, ring.full(), panel, m0);
    }
    // Needed last, so asked for last: the wait for the epilogue two tiles ago must not hold up the weights.
    shared.x_read[x.stage].wait(x.parity);
    shared.x_loaded[x.stage].arrive_expect_tx(Config::input_bytes);
#pragma unroll
    for (int row = 0; row < Config::step; ++row) {
      tma_load(shared.x[x.stage][row], maps.x, shared.x_loaded[x.stage], CacheHint::evict_normal,
               tile * Config::channels, m0 - (Config::W - 1) + row);
      tma_load(shared.dy[x.stage][row], maps.dy, shared.x_loaded[x.stage], CacheHint::evict_normal,
               tile * Config::channels, m0 + row);
    }
  }
}

// The register of tap w of channel c of token i, in accumulator i / 2.
template <class Config>
__device__ constexpr int register_of(int i, int c, int w) {
  return (c / 2 * Config::W + w) * 4 + i % 2 * 2 + c % 2;
}

// One thread's bias: of column `thread` of a tile.
template <class Config>
__device__ float load_tile_bias(const InputGradientArguments& p, int tile, int thread) {
  const int64_t column = int64_t{tile} * Config::N + thread;
  if (p.bias == nullptr || thread >= Config::N || column >= p.D * Config::W) return 0;
  return load_as_float(p.bias, std::is_same_v<typename Config::Element, bf16> ? Dtype::bf16 : Dtype::f16, column);
}

// taps = bias of a thread's channels, for all its tokens.
template <class Config>
__device__ void begin_with_bias(typename Config::Mma::Accumulator (&taps)[2], const float* shared_bias) {
  float bias[Config::P][Config::W];
  read_bias<typename Config::Tile>(bias, shared_bias);
#pragma unroll
  for (int c = 0; c < Config::P; ++c)
#pragma unroll
    for (int w = 0; w < Config::W; ++w)
#pragma unroll
      for (int i = 0; i < 4; ++i) taps[i / 2][register_of<Config>(i, c, w)] = bias[c][w];
}

// The mainloop of one tile: taps [128, N] += hidden weight^T
template <class Config>
__device__ void generate(typename Config::Mma::Accumulator (&taps)[2], InputGradientShared<Config>& shared,
                         const char* hidden, Consumer<Config::stages>& ring, int panels, int consumer, int thread) {
  using Mma = typename Config::Mma;
  int previous = 0;
  wgmma_fence_operand(taps[0]);
  wgmma_fence_operand(taps[1]);
  for (int panel = 0; panel < panels; ++panel, ring.advance()) {
    const int stage = ring.wait();
    if (panel == panels - 1 && thread % 32 == 0) shared.turn[1 - consumer].arrive();
    const char* a_tile;
    if constexpr (Config::resident)
      a_tile = hidden + panel * Config::TileA::bytes;
    else
      a_tile = shared.stage[stage].a;
    const typename Config::A a(a_tile);
    const typename Config::B b(shared.stage[stage].b);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Config::K; k += Mma::K)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        // taps += hidden weightᵀ   [64, N], k16
        Mma::ss(taps[half], a.at(64 * half, k), b.at(0, k), true);
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

// The epilogue of one tile, for the 4 tokens from row `first` on and the channels from d on of this thread. What few
// threads need stands apart, behind one branch each.
template <class Config>
class InputGradientEpilogue {
  using Element = typename Config::Element;
  using Taps = typename Config::Mma::Accumulator;
  static constexpr int W = Config::W, P = Config::P;

 public:
  __device__ InputGradientEpilogue(Taps (&taps)[2], InputGradientShared<Config>& shared,
                                   const InputGradientArguments& p, const TokenFlags<W>& flags, int first, int d,
                                   int consumer, int thread)
      : taps_(taps),
        shared_(shared),
        p_(p),
        flags_(flags),
        first_(first),
        d_(d),
        consumer_(consumer),
        thread_(thread),
        at_((int64_t{blockIdx.x} * Config::own + first) * p.D + d) {}

  // taps <- g, and dz is stored.
  __device__ void differentiate() {
    float z[4][P] = {};
    Elements<P> next = x_row(0);
#pragma unroll
    for (int row = 0; row < W + 3; ++row) {
      float input[P];
      unpack_elements<Element>(input, next);
      if (row < W + 2) next = x_row(row + 1);
      compiler_fence();  // no more than one row ahead: there are no registers for it
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (row >= i && row - i < W)
#pragma unroll
          for (int c = 0; c < P; ++c) z[i][c] += u(i, c, row - i) * input[c];  // z += taps[t, d, w] x[t - (W-1) + w, d]
    }
    if ((flags_.at_begin | flags_.outside) != 0) mend(z);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float dz[P];
      Elements<P> dy = load_elements<P>(shared_.dy[consumer_][i] + in_tile());
      if (flags_.outside >> i & 1) dy = {};
      unpack_elements<Element>(dz, dy);
#pragma unroll
      for (int c = 0; c < P; ++c) dz[c] *= activation_slope(z[i][c], p_.silu);
      store(p_.dz, i, dz);
#pragma unroll
      for (int c = 0; c < P; ++c)
#pragma unroll
        for (int w = 0; w < W; ++w) u(i, c, w) *= dz[c];
    }
  }

  // taps[., W-1] <- dx, where nothing flows in from beyond the thread's tokens; and what flows out of them is handed
  // on.
  __device__ void flow_within() {
#pragma unroll
    for (int k = 1; k < W; ++k)
#pragma unroll
      for (int i = 0; i + k <= 3; ++i) flow(i, k);
    if (thread_ % 32 < 4) {
#pragma unroll
      for (int k = 0; k < W - 1; ++k) {
        float* const to = &shared_.flow[consumer_][thread_ / 32][k][thread_ % 4 * P];
#pragma unroll
        for (int c = 0; c < P; c += 4)
          *reinterpret_cast<float4*>(to + c) = make_float4(u(0, c, k), u(0, c + 1, k), u(0, c + 2, k), u(0, c + 3, k));
      }
    }
  }

  // The rest, after a barrier of the warpgroup.
  __device__ void flow_between() {
    const int next = min(thread_ / 32 + 1, kWarpgroup / 32 - 1);
    float in[W - 1][P];
#pragma unroll
    for (int k = 0; k < W - 1; ++k)
#pragma unroll
      for (int c = 0; c < P; ++c) in[k][c] = __shfl_down_sync(0xffffffffu, u(0, c, k), 4);
    if (thread_ % 32 >= 28) {
#pragma unroll
      for (int k = 0; k < W - 1; ++k) {
        const float* const from = &shared_.flow[consumer_][next][k][thread_ % 4 * P];
#pragma unroll
        for (int c = 0; c < P; c += 4) {
          const float4 four = *reinterpret_cast<const float4*>(from + c);
          in[k][c] = four.x, in[k][c + 1] = four.y, in[k][c + 2] = four.z, in[k][c + 3] = four.w;
        }
      }
    }
#pragma unroll
    for (int k = 1; k < W; ++k) {
#pragma unroll
      for (int c = 0; c < P; ++c) u(3, c, k) += flags_.begins >> 4 & 1 ? 0.0f : in[k - 1][c];
#pragma unroll
      for (int i = 2; i >= 0; --i)
        if (i + k > 3) flow(i, k);
    }
  }

  // dx, and dconv_state of the sequences that begin here.
  __device__ void store_gradients() {
    if (flags_.first_tokens != 0 && d_ < p_.D) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (flags_.first_tokens >> i & 1) store_state_gradient(i);
    }
    if (flags_.outside != 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int c = 0; c < P; ++c) u(i, c, W - 1) = flags_.outside >> i & 1 ? 0.0f : u(i, c, W - 1);
    }
    if (flags_.at_end != 0 && d_ < p_.D) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (flags_.at_end >> i & 1) add_state_out(i);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float dx[P];
#pragma unroll
      for (int c = 0; c < P; ++c) dx[c] = u(i, c, W - 1);
      store(p_.dx, i, dx);
    }
  }

 private:
  __device__ float& u(int i, int c, int w) { return taps_[i / 2][register_of<Config>(i, c, w)]; }
  __device__ float u(int i, int c, int w) const { return taps_[i / 2][register_of<Config>(i, c, w)]; }

  // Where this thread's channels of its first token lie in a box of x or dy.
  __device__ int in_tile() const { return first_ / Config::step * Config::x_row_bytes + thread_ % 4 * P * 2; }

  // Row `row` of the thread's window, which begins W - 1 tokens before its first token.
  __device__ Elements<P> x_row(int row) const {
    return load_elements<P>(shared_.x[consumer_][row % Config::step] + in_tile() +
                            row / Config::step * Config::x_row_bytes);
  }

  // z again of tokens whose windows begin in a state; 0 of tokens outside.
  __device__ void mend(float (&z)[4][P]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (((flags_.at_begin | flags_.outside) >> i & 1) == 0) continue;
      const GradientPlace place = load_place(&shared_.places[first_ + i]);
#pragma unroll
      for (int c = 0; c < P; ++c) z[i][c] = 0;
      if (place.outside || d_ >= p_.D) continue;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        Elements<P> x = x_row(i + w);
        if (place.position + w < W - 1) x = input_of_state<P, W>(p_.states, place.row, d_, place.position + w);
        float input[P];
        unpack_elements<Element>(input, x);
#pragma unroll
        for (int c = 0; c < P; ++c) z[i][c] += u(i, c, w) * input[c];
      }
    }
  }

  // u[i, k] += u[i + 1, k - 1]
  __device__ void flow(int i, int k) {
    const bool cut = flags_.begins >> (i + 1) & 1;
#pragma unroll
    for (int c = 0; c < P; ++c) u(i, c, k) += cut ? 0.0f : u(i + 1, c, k - 1);
  }

  __device__ void store(void* to, int i, const float (&x)[P]) const {
    Elements<P> out;
#pragma unroll
    for (int j = 0; j < P / 2; ++j) out.words[j] = pack<Element>(x[2 * j], x[2 * j + 1]);
    if ((flags_.own >> i & 1) != 0 && d_ < p_.D) store_elements(static_cast<Element*>(to) + at_ + i * p_.D, out);
  }

  // dx of token i += grad_conv_state_out
  __device__ void add_state_out(int i) {
    const GradientPlace place = load_place(&shared_.places[first_ + i]);
    float dx[P];
#pragma unroll
    for (int c = 0; c < P; ++c) dx[c] = u(i, c, W - 1);
    add_gradient_of_state_out<Element, P, W>(dx, p_.gradients.of_out, place.row, p_.D, d_, 0, place.left + 1);
#pragma unroll
    for (int c = 0; c < P; ++c) u(i, c, W - 1) = dx[c];
  }

  // dconv_state of the sequence that begins with token i.
  __device__ void store_state_gradient(int i) const {
    const GradientPlace place = load_place(&shared_.places[first_ + i]);
    auto* const to = static_cast<uint16_t*>(p_.gradients.of_in) + (place.row * p_.D + d_) * (W - 1);
#pragma unroll
    for (int k = 0; k < W - 1; ++k) {
      float sum[P];
#pragma unroll
      for (int c = 0; c < P; ++c) sum[c] = u(i, c, k);
      if (place.left < W - 1)  // the sequence is not longer than its state: of what it began with something is left
        add_gradient_of_state_out<Element, P, W>(sum, p_.gradients.of_out, place.row, p_.D, d_, k - (W - 1),
                                                 place.left + 1);
#pragma unroll
      for (int c = 0; c < P; ++c) to[c * (W - 1) + k] = static_cast<uint16_t>(pack<Element>(sum[c], 0));
    }
  }

  Taps (&taps_)[2];
  InputGradientShared<Config>& shared_;
  const InputGradientArguments& p_;
  const TokenFlags<W>& flags_;
  const int first_, d_, consumer_, thread_;
  const int64_t at_;  // of the first token in dz and dx
};

template <class Config>
__device__ void consume(InputGradientShared<Config>& shared, const char* hidden, const InputGradientArguments& p,
                        const ChannelTiles& own) {
  const int thread = threadIdx.x % kWarpgroup, consumer = threadIdx.x / kWarpgroup - 1;
  const int all = 1, mine = 2 + consumer;  // named barriers: of both consumers, of this one
  const int64_t m0 = int64_t{blockIdx.x} * Config::own;
  if (consumer == 0) {
    const GradientPlace place = gradient_place<Config::W>(p.sequences, m0 + thread);
    store_place(&shared.places[thread], place);
    if (blockIdx.y == 0 && thread < Config::own && m0 + thread < p.sequences.tokens)
      store_place(p.places + m0 + thread, place);
  } else if (thread == 0) {
    store_place(&shared.places[Config::M], gradient_place<Config::W>(p.sequences, m0 + Config::M));
  }
  named_barrier_sync(all, Config::consumers * kWarpgroup);
  const int first = 32 * (thread / 32) + thread % 32 / 4 * 4;  // of the thread's 4 rows
  const TokenFlags<Config::W> flags(
      &shared.places[first], static_cast<int>(min(int64_t{Config::own - first}, p.sequences.tokens - m0 - first)));
  Consumer<Config::stages> ring(shared.ring);
  PhaseParity x = PhaseParity::first(), turn = consumer == 0 ? PhaseParity::preceding() : PhaseParity::first();
  if (Config::resident && own.count > consumer) shared.hidden_loaded.wait(PhaseParity::first());
  if (consumer == 1) ring.advance(p.panels);
  float bias = load_tile_bias<Config>(p, own.first + consumer, thread);
  for (int i = consumer; i < own.count; i += Config::consumers, x.flip(), turn.flip()) {
    const int tile = own.first + i;
    if (thread < Config::N) shared.bias[consumer][Config::bias_at(thread)] = bias;
    named_barrier_sync(mine, kWarpgroup);
    typename Config::Mma::Accumulator taps[2];
    begin_with_bias<Config>(taps, shared.bias[consumer]);
    bias = load_tile_bias<Config>(p, tile + Config::consumers, thread);
    shared.turn[consumer].wait(turn);
    generate<Config>(taps, shared, hidden, ring, p.panels, consumer, thread);
    ring.advance(p.panels);  // the other consumer's tile
    shared.x_loaded[consumer].wait(x);
    InputGradientEpilogue<Config> epilogue(taps, shared, p, flags, first,
                                           tile * Config::channels + thread % 4 * Config::P, consumer, thread);
    epilogue.differentiate();
    epilogue.flow_within();
    named_barrier_sync(mine, kWarpgroup);
    if (thread == 0) shared.x_read[consumer].arrive();
    epilogue.flow_between();
    epilogue.store_gradients();
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1)
    input_gradient_kernel(const __grid_constant__ InputGradientMaps maps,
                          const __grid_constant__ InputGradientArguments p,
                          const __grid_constant__ ChannelSplit split) {
  extern __shared__ __align__(kTileAlign) char hidden[];  // [panels][128 tokens, 64] if it is resident
  auto& shared = *reinterpret_cast<InputGradientShared<Config>*>(
      hidden + (Config::resident ? p.panels * Config::TileA::bytes : 0));
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
      gradients_of_empty_sequences<Config::W>(p.sequences, p.gradients, p.D, cta * 3 + warp_index() - 1, ctas * 3);
    }
  } else {
    setmaxnreg_inc<232>();
    consume<Config>(shared, hidden, p, own);
  }
  __syncwarp();
  cluster_sync();  // a CTA must not exit while its peer may still write to its shared memory or arrive on its barriers
}

}  // namespace jet::hopper
