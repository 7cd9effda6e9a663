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

#include "csrc/dynamic_conv/backward/places.cuh"
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

// The epilogue of one tile, for the 4 tokens from row `first` on and the channels from d on of this thread.
template <class Config>
class InputGradientEpilogue {
  using Element = typename Config::Element;
  using Taps = typename Config::Mma::Accumulator;
  static constexpr int W = Config::W, P = Config::P;

 public:
  __device__ InputGradientEpilogue(Taps (&taps)[2], InputGradientShared<Config>& shared,
                                   const InputGradientArguments& p, int64_t d, int consumer, int thread)
      : taps_(taps), shared_(shared), p_(p), d_(d), consumer_(consumer), thread_(thread) {
    first_ = 32 * (thread / 32) + thread % 32 / 4 * 4;
    m_ = int64_t{blockIdx.x} * Config::own + first_;
  }

  // taps <- g, and dz is stored.
  __device__ void differentiate() {
    const int at = first_ / Config::step * Config::x_row_bytes + thread_ % 4 * P * 2;
    // Row `row` of the thread's window, which begins W - 1 tokens before its first token.
    const auto x_row = [&](int row) {
      return load_elements<P>(shared_.x[consumer_][row % Config::step] + at + row / Config::step * Config::x_row_bytes);
    };
    Elements<P> inputs[W];
#pragma unroll
    for (int w = 1; w < W; ++w) inputs[w] = x_row(w - 1);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const GradientPlace place = load_place(&shared_.places[first_ + i]);
#pragma unroll
      for (int w = 0; w < W - 1; ++w) inputs[w] = inputs[w + 1];
      inputs[W - 1] = x_row(i + W - 1);
      float z[P] = {};
#pragma unroll
      for (int w = 0; w < W; ++w) {
        Elements<P> x = inputs[w];
        if (place.position + w < W - 1 && d_ < p_.D)
          x = input_of_state<P, W>(p_.states, place.row, d_, place.position + w);
        float input[P];
        unpack_elements<Element>(input, x);
#pragma unroll
        for (int c = 0; c < P; ++c) z[c] += u(i, c, w) * input[c];  // z += taps[t, d, w] x[t - (W-1) + w, d]
      }
      differentiate_token(i, z, load_elements<P>(shared_.dy[consumer_][i] + at), place.outside);
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
    const bool ends = begins(4);  // the tokens of this thread are the last of their sequence
    const int next = min(thread_ / 32 + 1, kWarpgroup / 32 - 1);
#pragma unroll
    for (int k = 0; k < W - 1; ++k) {
      float in[P];
#pragma unroll
      for (int c = 0; c < P; ++c) in[c] = __shfl_down_sync(0xffffffffu, u(0, c, k), 4);
      if (thread_ % 32 >= 28) {
        const float* const from = &shared_.flow[consumer_][next][k][thread_ % 4 * P];
#pragma unroll
        for (int c = 0; c < P; c += 4) {
          const float4 four = *reinterpret_cast<const float4*>(from + c);
          in[c] = four.x, in[c + 1] = four.y, in[c + 2] = four.z, in[c + 3] = four.w;
        }
      }
#pragma unroll
      for (int c = 0; c < P; ++c) u(3, c, k + 1) += ends ? 0.0f : in[c];
#pragma unroll
      for (int i = 2; i >= 0; --i)
        if (i + k + 1 > 3) flow(i, k + 1);
    }
  }

  __device__ void store() const {
    if (d_ >= p_.D) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first_ + i >= Config::own || m_ + i >= p_.sequences.tokens) continue;
      const GradientPlace place = load_place(&shared_.places[first_ + i]);
      if (place.position == 0 && !place.outside) store_state_gradient(i, place);
      float dx[P];
#pragma unroll
      for (int c = 0; c < P; ++c) dx[c] = u(i, c, W - 1);
      if (place.left < W - 1)
        add_gradient_of_state_out<Element, P, W>(dx, p_.gradients.of_out, place.row, p_.D, d_, 0, place.left + 1);
      Elements<P> out;
#pragma unroll
      for (int j = 0; j < P / 2; ++j) out.words[j] = pack<Element>(dx[2 * j], dx[2 * j + 1]);
      if (place.outside) out = {};
      store_elements(static_cast<Element*>(p_.dx) + (m_ + i) * p_.D + d_, out);
    }
  }

 private:
  __device__ float& u(int i, int c, int w) { return taps_[i / 2][register_of<Config>(i, c, w)]; }
  __device__ float u(int i, int c, int w) const { return taps_[i / 2][register_of<Config>(i, c, w)]; }

  // Whether nothing flows out of token i of this thread into the one before it.
  __device__ bool begins(int i) const {
    const GradientPlace place = load_place(&shared_.places[first_ + i]);
    return place.position == 0 || place.outside;
  }

  // u[i, k] += u[i + 1, k - 1]
  __device__ void flow(int i, int k) {
    const bool cut = begins(i + 1);
#pragma unroll
    for (int c = 0; c < P; ++c) u(i, c, k) += cut ? 0.0f : u(i + 1, c, k - 1);
  }

  // taps <- g of one token, whose dz is stored.
  __device__ void differentiate_token(int i, const float (&z)[P], const Elements<P>& dy, bool outside) {
    float dz[P];
    unpack_elements<Element>(dz, dy);
#pragma unroll
    for (int c = 0; c < P; ++c) {
      dz[c] = outside ? 0.0f : dz[c] * activation_slope(z[c], p_.silu);
#pragma unroll
      for (int w = 0; w < W; ++w) u(i, c, w) *= dz[c];
    }
    if (first_ + i >= Config::own || m_ + i >= p_.sequences.tokens || d_ >= p_.D) return;
    Elements<P> out;
#pragma unroll
    for (int j = 0; j < P / 2; ++j) out.words[j] = pack<Element>(dz[2 * j], dz[2 * j + 1]);
    store_elements(static_cast<Element*>(p_.dz) + (m_ + i) * p_.D + d_, out);
  }

  // dconv_state of the sequence that begins with token i.
  __device__ void store_state_gradient(int i, const GradientPlace& place) const {
    uint32_t elements[P * (W - 1)];
#pragma unroll
    for (int k = 0; k < W - 1; ++k) {
      float sum[P];
#pragma unroll
      for (int c = 0; c < P; ++c) sum[c] = u(i, c, k);
      if (place.left < W - 1)
        add_gradient_of_state_out<Element, P, W>(sum, p_.gradients.of_out, place.row, p_.D, d_, k - (W - 1),
                                                 place.left + 1);
#pragma unroll
      for (int c = 0; c < P; ++c) elements[c * (W - 1) + k] = pack<Element>(sum[c], 0);
    }
    store_elements(static_cast<Element*>(p_.gradients.of_in) + (place.row * p_.D + d_) * (W - 1),
                   gather<P*(W - 1)>([&](int e) { return elements[e]; }));
  }

  Taps (&taps_)[2];
  InputGradientShared<Config>& shared_;
  const InputGradientArguments& p_;
  const int64_t d_;
  const int consumer_, thread_;
  int first_;
  int64_t m_;  // the first token
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
  Consumer<Config::stages> ring(shared.ring);
  PhaseParity x = PhaseParity::first(), turn = consumer == 0 ? PhaseParity::preceding() : PhaseParity::first();
  if (Config::resident && own.count > consumer) shared.hidden_loaded.wait(PhaseParity::first());
  if (consumer == 1) ring.advance(p.panels);
  for (int i = consumer; i < own.count; i += Config::consumers, x.flip(), turn.flip()) {
    const int tile = own.first + i;
    const int64_t column = int64_t{tile} * Config::N + thread;
    if (thread < Config::N)
      shared.bias[consumer][Config::bias_at(thread)] =
          p.bias == nullptr || column >= p.D * Config::W
              ? 0.0f
              : load_as_float(p.bias, std::is_same_v<typename Config::Element, bf16> ? Dtype::bf16 : Dtype::f16,
                              column);
    named_barrier_sync(mine, kWarpgroup);
    typename Config::Mma::Accumulator taps[2];
    begin_with_bias<Config>(taps, shared.bias[consumer]);
    shared.turn[consumer].wait(turn);
    generate<Config>(taps, shared, hidden, ring, p.panels, consumer, thread);
    ring.advance(p.panels);  // the other consumer's tile
    shared.x_loaded[consumer].wait(x);
    InputGradientEpilogue<Config> epilogue(taps, shared, p, int64_t{tile} * Config::channels + thread % 4 * Config::P,
                                           consumer, thread);
    epilogue.differentiate();
    epilogue.flow_within();
    named_barrier_sync(mine, kWarpgroup);
    if (thread == 0) shared.x_read[consumer].arrive();
    epilogue.flow_between();
    epilogue.store();
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
