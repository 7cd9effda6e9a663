// The configuration, arguments and shared memory of `gradients` (gradients.cuh), and its producer warpgroup.
#pragma once

#include "csrc/gated_delta_rule/chunk/sweep_shared.cuh"
#include "csrc/hopper/launch.h"
#include "csrc/hopper/warp_specialization.h"

namespace jet::hopper {

template <int K_, class Element_>
struct GradientConfig {
  static constexpr int K = K_;
  using Element = Element_;
  // Key columns are worked on all at once, or where accumulators have no registers for them in two parts.
  static constexpr int parts = K <= 128 ? 1 : 2, P = K / parts;
  static constexpr int stages = 2;  // what fits
  static constexpr int threads = kWarpgroup * 3, consumers = kWarpgroup * 2, dot_warps = 3;
  static constexpr Swizzle swizzle = P % 64 == 0 ? Swizzle::b128 : Swizzle::b64;  // 96 is three panels of 32 elements
  using Rows = OperandTile<Element, swizzle, Major::k, C, K>;                     // q or k as in memory
  static constexpr int part_bytes = Rows::bytes / parts;                          // whole panels
  static_assert(Rows::start(0, P*(parts - 1)) == part_bytes * (parts - 1));
  using RowsOperand = MatrixDescriptor<Rows>;
  using ColumnsOperand = MatrixDescriptor<OperandTile<Element, swizzle, Major::mn, K, C>>;  // the same bytes
  using Values = OperandTile<Element, Swizzle::b128, Major::k, C, kRows>;  // 64 columns of dO, dV or U'
  using ValuesOperand = MatrixDescriptor<Values>;
  using States = OperandTile<Element, Swizzle::b128, Major::k, P, kRows>;  // of S0 or dS, key columns of a part
  using StatesOperand = MatrixDescriptor<States>;
  using Square = OperandTile<Element, Swizzle::b128, Major::k, C, C>;  // of dP or dM
  using SquareOperand = MatrixDescriptor<Square>;
  using SquareTransposed = MatrixDescriptor<OperandTile<Element, Swizzle::b128, Major::mn, C, C>>;
  using OutputRows = OperandTile<Element, swizzle, Major::k, C, P>;
  using MmaSquare = Wgmma<Element, C>;
  using MmaState = Wgmma<Element, P>;
  using MmaRows = Wgmma<Element, P, Major::k, Major::mn>;
  using MmaTransposed = Wgmma<Element, P, Major::mn, Major::mn>;
  using Tokens = typename MmaSquare::Accumulator;  // [C, C]
  using Keys = typename MmaState::Accumulator;     // [C, P]
  static_assert(Values::bytes == ValueTile::bytes && Values::offset(5, 40) == ValueTile::offset(40, 5));
  static_assert(States::offset(5, 40) == StateTile<K>::offset(40, 5) && States::bytes * parts == StateTile<K>::bytes);
};

struct GradientArguments {
  ChunkPlan plan;
  int64_t H, Hk, V;
  float scale;
  bool l2norm;
  const char *images, *states, *state_gradients, *updates;  // of chunks and value heads: prepare, states, reverse
  const float* g;
  TokenStrides g_strides;
  void *dq, *dk;        // [B, T, Hk, K]
  float *dg, *dbeta;    // [B, T, H]
  float* accumulators;  // of every CTA: GradientConfig::parts times those of 256 threads; null if none are needed
};

// q, k: (K, Hk, T, B); dO, dV: (V, H, T, B)
struct GradientMaps {
  CUtensorMap q, k, grad_o, dv;
};

constexpr int kGradientVectors = int{kVectors} + int{kGates};
static_assert(kGatesAt == kVectorsAt + kVectors * kVectorBytes, "one copy brings both");

// Sums over the key columns of rows, [C] each.
enum RowSum : int {
  kReadByQuery,  // scale e^{c_i} <q_i, S0 dO_i>
  kReadByKey,    // e^{c_i} <k_i, S0 dV_i>
  kStored,       // e^{c_C - c_i} <k_i, dS U'_i>
  kRowSums
};

template <class Config>
struct GradientStage {
  alignas(kTileAlign) char grad_o[Config::Values::bytes];
  alignas(kTileAlign) char dv[Config::Values::bytes];
  alignas(kTileAlign) char u[Config::Values::bytes];
  alignas(kTileAlign) char state[Config::States::bytes];
  alignas(kTileAlign) char state_gradient[Config::States::bytes];
};

constexpr int kSumStride = C + 8;  // floats: rows of a quad lie in different banks

template <class Config>
struct GradientShared {
  GradientStage<Config> stage[Config::stages];
  alignas(kTileAlign) char q[Config::Rows::bytes];
  alignas(kTileAlign) char k[Config::Rows::bytes];
  union {                       // one after the other
    float w[2][C][kSumStride];  // W is their sum
    struct {
      alignas(kTileAlign) char p_query[Config::Square::bytes];  // dP_ij |q_i| factors: for dK, transposed
      alignas(kTileAlign) char m_key[Config::Square::bytes];    // dM_ij |k_j| factors: for dK
      alignas(kTileAlign) char m_row[Config::Square::bytes];    // dM_ij |k_i| factors, transposed
    };
    alignas(kTileAlign) char output[2][Config::OutputRows::bytes];
  };
  alignas(128) float vectors[kGradientVectors][C];
  float of_block[kBlocks][C];                 // sums over 16 rows of w
  float passing[C], of_beta[C], diagonal[C];  // what passes t, sums of W, A2_jj
  float row_sums[kRowSums][C];
  float through[4];  // <S0, dS>, of three warps; the fourth is zero
  Ring<Config::stages> ring;
  Mbarrier rows_loaded, rows_read, vectors_loaded, head_done, through_summed;
};

// A chunk of a key head: one after the other, a CTA takes every gridDim.x-th.
struct GradientItem {
  int64_t chunk, row, token;
  int count, hk;
};

// False: there are fewer chunks.
__device__ inline bool find_item(const GradientArguments& p, int64_t item, GradientItem& at) {
  const int64_t chunk = item / p.Hk, n = sequence_of_chunk(p.plan, chunk);
  if (n < 0) return false;
  const Sequence sequence = sequence_of(p.plan, n);
  const int64_t first = (chunk - sequence.first_chunk) * C;
  at = {.chunk = chunk,
        .row = sequence.row,
        .token = sequence.begin + first,
        .count = static_cast<int>(min(sequence.length - first, int64_t{C})),
        .hk = static_cast<int>(item - chunk * p.Hk)};
  return true;
}

template <class Body>
__device__ void for_each_item(const GradientArguments& p, const Body& body) {
  const int64_t items = p.plan.most_chunks * p.Hk;
#pragma unroll 1
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    GradientItem at;
    if (!find_item(p, item, at)) return;
    body(at);
  }
}

// One thread loads. Rows of q and k and the vectors are wanted behind a head's products with states: so the first of
// these are on their way while the head before is being finished.
template <class Config>
struct GradientLoader {
  const GradientArguments& p;
  const GradientMaps& maps;
  GradientShared<Config>& shared;
  Producer<Config::stages> ring{shared.ring};
  PhaseParity rows = PhaseParity::preceding(), head = PhaseParity::preceding();

  __device__ void load_rows(const GradientItem& at) {
    using Rows = typename Config::Rows;
    shared.rows_read.wait(rows);
    rows.flip();
    shared.rows_loaded.arrive_expect_tx(2 * Rows::bytes);
    const int token = static_cast<int>(at.token), row = static_cast<int>(at.row);
    for (int panel = 0; panel < Rows::panels; ++panel) {
      const int column = panel * Rows::panel_width, to = panel * Rows::panel_bytes;
      tma_load(shared.q + to, maps.q, shared.rows_loaded, CacheHint::evict_first, column, at.hk, token, row);
      tma_load(shared.k + to, maps.k, shared.rows_loaded, CacheHint::evict_first, column, at.hk, token, row);
    }
  }

  __device__ void load_vectors(int64_t place) {
    shared.head_done.wait(head);
    head.flip();
    constexpr int bytes = kGradientVectors * kVectorBytes;
    shared.vectors_loaded.arrive_expect_tx(bytes);
    cp_async_bulk_load(shared.vectors, p.images + place * kBackwardImageBytes + kVectorsAt, bytes,
                       shared.vectors_loaded);
  }

  // 64 value columns, for key columns of a part.
  __device__ void load_values(const GradientItem& at, int h, int64_t tile, int column, int part) {
    using States = typename Config::States;
    auto& stage = shared.stage[ring.acquire(3 * Config::Values::bytes + 2 * States::bytes)];
    const int token = static_cast<int>(at.token), row = static_cast<int>(at.row);
    const int64_t state = (tile * Config::parts + part) * States::bytes;
    tma_load(stage.grad_o, maps.grad_o, ring.full(), CacheHint::evict_first, column, h, token, row);
    tma_load(stage.dv, maps.dv, ring.full(), CacheHint::evict_first, column, h, token, row);
    cp_async_bulk_load(stage.u, p.updates + tile * ValueTile::bytes, ValueTile::bytes, ring.full());
    cp_async_bulk_load(stage.state, p.states + state, States::bytes, ring.full());
    cp_async_bulk_load(stage.state_gradient, p.state_gradients + state, States::bytes, ring.full());
    ring.advance();
  }

  __device__ void load_head(const GradientItem& at, int h, bool first) {
    const int tiles = static_cast<int>(value_tiles(p.V)), early = min(Config::stages, tiles * Config::parts);
    const int64_t place = at.chunk * p.H + h;
    int issued = 0;
#pragma unroll 1
    for (int part = 0; part < Config::parts; ++part)
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile) {
        load_values(at, h, place * tiles + tile, tile * kRows, part);
        if (++issued != early) continue;
        if (first) load_rows(at);
        load_vectors(place);
      }
  }
};

template <class Config>
__device__ void load_items(const GradientArguments& p, const GradientMaps& maps, GradientShared<Config>& shared) {
  GradientLoader<Config> loader{.p = p, .maps = maps, .shared = shared};
  const int heads = static_cast<int>(p.H / p.Hk);
  for_each_item(p, [&](const GradientItem& at) {
    for (int i = 0; i < heads; ++i) loader.load_head(at, at.hk * heads + i, i == 0);
  });
}

// Of 8 elements of S0 and dS.
template <class Element>
__device__ float dot_of(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float2 of_x = unpack<Element>(x[w]), of_y = unpack<Element>(y[w]);
    sum += of_x.x * of_y.x, sum += of_x.y * of_y.y;
  }
  return sum;
}

// <S0, dS> of every head, by the producer's three other warps: both are laid out alike.
template <class Config>
__device__ void dot_states(const GradientArguments& p, GradientShared<Config>& shared) {
  constexpr int threads = Config::dot_warps * 32;
  const int thread = threadIdx.x - 32, warp = thread / 32;
  const int turns = static_cast<int>(value_tiles(p.V)) * Config::parts, heads = static_cast<int>(p.H / p.Hk);
  Consumer<Config::stages> ring(shared.ring);
  PhaseParity head = PhaseParity::preceding();
  for_each_item(p, [&](const GradientItem&) {
#pragma unroll 1
    for (int i = 0; i < heads; ++i) {
      float sum = 0;
#pragma unroll 1
      for (int turn = 0; turn < turns; ++turn, ring.advance()) {
        const int s = ring.wait();
        const auto& stage = shared.stage[s];
        int end = Config::States::bytes;
        asm volatile("" : "+r"(end));  // known, it would become a part of addresses, which then begin below zero
#pragma unroll 2
        for (int at = thread * 16; at < end; at += threads * 16)
          sum += dot_of<typename Config::Element>(*reinterpret_cast<const uint4*>(stage.state + at),
                                                  *reinterpret_cast<const uint4*>(stage.state_gradient + at));
        __syncwarp();
        if (thread % 32 == 0) ring.release(s);
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      shared.head_done.wait(head);
      head.flip();
      __syncwarp();  // a lane that lags behind would miss its phase
      if (thread % 32 == 0) {
        shared.through[warp] = sum;
        shared.through_summed.arrive();
      }
    }
  });
}

}  // namespace jet::hopper
