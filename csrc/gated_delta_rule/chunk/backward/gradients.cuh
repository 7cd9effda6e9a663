// `gradients`: dQ, dK, dg and dbeta of a chunk, once its states, their gradients, U' and dV are known; in parallel over
// chunks. In the names of flash-linear-attention: chunk_bwd_dqkwg and prepare_wy_repr_bwd.
//
// A CTA takes a chunk of one key head and walks over the value heads that read it, so that their gradients are summed
// in a fixed order. With U = diag(beta) U', Γ_ij = e^{c_i - c_j}:
//   A1 = dO U'^T   A2 = dV U'^T                                    [C, C]
//   A3 = U' dS^T   A4 = dO S0^T   A5 = dV S0^T                     [C, K]
//   dP_ij =  scale A1_ij beta_j Γ_ij, j <= i                       dM_ij = -A2_ij beta_j Γ_ij, j < i
//   dQ = scale e^{c_i} A4 + dP K
//   dK = -e^{c_i} A5 + beta_i e^{c_C - c_i} A3 + dM K + dM^T K + dP^T Q
//   W_ij = (scale A1 ∘ Q K^T, j <= i, - A2 ∘ K K^T, j < i)_ij Γ_ij
//   dbeta_j = A2_jj / beta_j, which is <U'_j, (T^T dU)_j>, or for a small beta sum_i W_ij + e^{c_C - c_j} <k_j, A3_j>
//   dg_t = sum_{j < t <= i} W_ij beta_j + sum_{i >= t} (scale e^{c_i} <q_i, A4_i> - e^{c_i} <k_i, A5_i>)
//          + sum_{j < t} beta_j e^{c_C - c_j} <k_j, A3_j> + e^{c_C} <S0, dS>
// Nothing in dg cancels exactly: every term has e^{g_t} as a factor. Warpgroup 1, of the query, has A1, A4 and dQ;
// warpgroup 2, of the key, the others. K and Q are over their norms with l2norm; rows in memory are the operands, and
// the norms are factors of dP and dM.
#pragma once

#include "csrc/gated_delta_rule/chunk/backward/gradients_within.cuh"

namespace jet::hopper {

// A consumer's end of everything.
template <class Config>
struct GradientConsumer {
  const GradientArguments& p;
  GradientShared<Config>& shared;
  Consumer<Config::stages> ring{shared.ring};
  PhaseParity rows = PhaseParity::first(), head = PhaseParity::first();

  // The sums of a warpgroup's part where they are kept from head to head.
  __device__ float* accumulators(int part, int group, int thread) const {
    return p.accumulators +
           ((int64_t{blockIdx.x} * Config::parts + part) * 2 + group) * Config::MmaState::registers * kWarpgroup +
           thread;
  }
};

// The next 64 value columns: body(stage) issues products into accumulators d.
template <class Config, class Body, class... Accumulators>
__device__ void with_values(GradientConsumer<Config>& self, const Body& body, Accumulators&... d) {
  const int s = self.ring.wait();
  wgmma_fence(d...);
  body(self.shared.stage[s]);
  wgmma_commit_group();
  wgmma_wait_group<0>();
  (wgmma_fence_operand(d), ...);
  __syncwarp();
  if (threadIdx.x % 32 == 0) self.ring.release(s);
  self.ring.advance();
}

// Query: dq = dO S0^T [C, P] of a part, and with the first part a = dO U'^T [C, C].
template <bool square, class Config>
__device__ void read_values(GradientConsumer<Config>& self, typename Config::Keys& dq, typename Config::Tokens& a) {
  using Values = typename Config::ValuesOperand;
  const int tiles = static_cast<int>(value_tiles(self.p.V));
  clear(dq);
  if constexpr (square) clear(a);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const auto of_states = [&](const GradientStage<Config>& stage) {
      multiply_values<typename Config::MmaState>(dq, Values(stage.grad_o), typename Config::StatesOperand(stage.state));
      if constexpr (square) multiply_values<typename Config::MmaSquare>(a, Values(stage.grad_o), Values(stage.u));
    };
    if constexpr (square)
      with_values(self, of_states, dq, a);
    else
      with_values(self, of_states, dq);
  }
}

// Key: dk = dV S0^T and stored = U' dS^T [C, P] of a part, and with the first part a = dV U'^T [C, C].
template <bool square, class Config>
__device__ void read_values(GradientConsumer<Config>& self, typename Config::Keys& dk, typename Config::Keys& stored,
                            typename Config::Tokens& a) {
  using Values = typename Config::ValuesOperand;
  using States = typename Config::StatesOperand;
  const int tiles = static_cast<int>(value_tiles(self.p.V));
  clear(dk), clear(stored);
  if constexpr (square) clear(a);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const auto of_states = [&](const GradientStage<Config>& stage) {
      multiply_values<typename Config::MmaState>(dk, Values(stage.dv), States(stage.state));
      multiply_values<typename Config::MmaState>(stored, Values(stage.u), States(stage.state_gradient));
      if constexpr (square) multiply_values<typename Config::MmaSquare>(a, Values(stage.dv), Values(stage.u));
    };
    if constexpr (square)
      with_values(self, of_states, dk, stored, a);
    else
      with_values(self, of_states, dk, stored);
  }
}

// The rows of q and k are there; those behind the sequence's end become zero.
template <class Config>
__device__ void wait_for_rows(GradientConsumer<Config>& self, int count) {
  self.shared.rows_loaded.wait(self.rows);
  self.rows.flip();
  if (count == C) return;
  constexpr int units = Config::Rows::row_bytes / 16;
  const int thread = threadIdx.x - kWarpgroup;
#pragma unroll 1
  for (int panel = 0; panel < Config::Rows::panels; ++panel)
    for (int u = count * units + thread; u < C * units; u += Config::consumers) {
      const int at = panel * Config::Rows::panel_bytes + u * 16;
      *reinterpret_cast<uint4*>(self.shared.q + at) = make_uint4(0, 0, 0, 0);
      *reinterpret_cast<uint4*>(self.shared.k + at) = make_uint4(0, 0, 0, 0);
    }
  fence_proxy_async();
  sync_consumers();
}

// dQ of a part but for what comes from the chunk: scale e^{c_i} dO S0^T, and its sums over key columns.
template <class Config>
__device__ void finish_reading(const GradientThread<Config>& me, typename Config::Keys& dq, int part) {
  float factor[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) factor[e] = me.scale * me.shared.vectors[kReadQ][me.row(e)];
  scale_rows(dq, factor);
  const float2 dots = dots_with_rows<Config>(me.shared.q, dq, part, me.thread);
  put_row_sums(me, kReadByQuery, me.of_query(me.row(0)) * dots.x, me.of_query(me.row(1)) * dots.y, part);
}

// dK likewise: -e^{c_i} dV S0^T + beta_i e^{c_C - c_i} U' dS^T.
template <class Config>
__device__ void finish_reading(const GradientThread<Config>& me, typename Config::Keys& dk,
                               typename Config::Keys& stored, int part) {
  float of_read[2], of_store[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = me.row(e);
    of_read[e] = me.shared.vectors[kReadQ][i], of_store[e] = decay_between(me.c(C - 1), me.c(i));
  }
  scale_rows(dk, of_read);
  scale_rows(stored, of_store);
  const float2 reads = dots_with_rows<Config>(me.shared.k, dk, part, me.thread);
  const float2 stores = dots_with_rows<Config>(me.shared.k, stored, part, me.thread);
  const float keys[2] = {me.of_key(me.row(0)), me.of_key(me.row(1))};
  const float beta[2] = {me.beta(me.row(0)), me.beta(me.row(1))};
  put_row_sums(me, kReadByKey, keys[0] * reads.x, keys[1] * reads.y, part);
  put_row_sums(me, kStored, keys[0] * stores.x, keys[1] * stores.y, part);
#pragma unroll
  for (int r = 0; r < Config::MmaState::registers; ++r) dk[r] = beta[r / 2 % 2] * stored[r] - dk[r];
}

// d += A X of a square A in shared memory and key columns of rows X   [C, P]
template <class Mma, class Config, class Square>
__device__ void multiply_square(typename Config::Keys& d, const Square& a, const char* rows, int part) {
  const typename Config::ColumnsOperand x(rows);
#pragma unroll
  for (int step = 0; step < C / Mma::K; ++step)
    Mma::ss(d, a.at(0, step * Mma::K), x.at(part * Config::P, step * Mma::K), true);
}

// dQ += dP K   [C, P]: dP as two numbers in the dtype of q, what rounding leaves as the second. Where keys resemble
// each other the sum over them is what large terms leave.
template <class Config>
__device__ void multiply_by_keys(GradientShared<Config>& shared, typename Config::Keys& d,
                                 const typename Config::Tokens& dp, int part) {
  using Mma = typename Config::MmaRows;
  using Element = typename Config::Element;
  const typename Config::ColumnsOperand k(shared.k);
  uint32_t high[kSteps][4], low[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    accumulator_to_a_fragment<Element>(high[step], dp, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 rounded = unpack<Element>(high[step][i]);
      low[step][i] = pack<Element>(dp[8 * step + 2 * i] - rounded.x, dp[8 * step + 2 * i + 1] - rounded.y);
    }
  }
  wgmma_fence(d, high, low);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    Mma::rs(d, high[step], k.at(part * Config::P, step * Mma::K), true);
    Mma::rs(d, low[step], k.at(part * Config::P, step * Mma::K), true);
  }
  wgmma_commit_group();
  wgmma_wait_group<0>();
  wgmma_fence_operand(d);
  wgmma_hold_operand(high), wgmma_hold_operand(low);
}

// dK += dM K + dM^T K + dP^T Q   [C, P]
template <class Config>
__device__ void multiply_by_rows(GradientShared<Config>& shared, typename Config::Keys& d, int part) {
  using Rows = typename Config::MmaRows;
  using Transposed = typename Config::MmaTransposed;
  using SquareTransposed = typename Config::SquareTransposed;
  wgmma_fence(d);
  multiply_square<Rows, Config>(d, typename Config::SquareOperand(shared.m_key), shared.k, part);  // dM K
  multiply_square<Transposed, Config>(d, SquareTransposed(shared.m_row), shared.k, part);          // dMᵀ K
  multiply_square<Transposed, Config>(d, SquareTransposed(shared.p_query), shared.q, part);        // dPᵀ Q
  wgmma_commit_group();
  wgmma_wait_group<0>();
  wgmma_fence_operand(d);
}

// Below it dV = beta X, rounded, may have lost what X = T^T dU is.
constexpr float kSmallBeta = 1.0f / 256;

// dg and dbeta of a head, by one warp: two tokens a lane.
template <class Config>
__device__ void store_gates(const GradientArguments& p, const GradientThread<Config>& me, const GradientItem& at,
                            int h) {
  const auto& shared = me.shared;
  const int lane = me.thread % 32;
  float read[2], stored[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int t = 2 * lane + e;
    read[e] = t < me.count ? shared.row_sums[kReadByQuery][t] - shared.row_sums[kReadByKey][t] : 0;
    stored[e] = shared.row_sums[kStored][t] * me.beta(t);
  }
  float behind = read[0] + read[1], before = stored[0] + stored[1];
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const float later = __shfl_down_sync(0xffffffffu, behind, distance);
    const float earlier = __shfl_up_sync(0xffffffffu, before, distance);
    if (lane + distance < 32) behind += later;
    if (lane >= distance) before += earlier;
  }
  float of_later = __shfl_down_sync(0xffffffffu, behind, 1), of_earlier = __shfl_up_sync(0xffffffffu, before, 1);
  if (lane == 31) of_later = 0;
  if (lane == 0) of_earlier = 0;
  const float reads[2] = {behind, of_later + read[1]}, stores[2] = {of_earlier, of_earlier + stored[0]};
  const float through =
      shared.vectors[kReadQ][C - 1] * (shared.through[0] + shared.through[1] + shared.through[2] + shared.through[3]);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int t = 2 * lane + e;
    if (t >= me.count) continue;
    const int64_t to = ((at.row * p.plan.T) + at.token + t) * p.H + h;
    const float g = p.g[at.row * p.g_strides.b + (at.token + t) * p.g_strides.t + h * p.g_strides.h];
    p.dg[to] = g < float(kMinLogDecay) ? 0 : shared.passing[t] + reads[e] + stores[e] + through;
    const float beta = me.beta(t);
    p.dbeta[to] = beta > kSmallBeta ? shared.diagonal[t] / beta : shared.of_beta[t] + shared.row_sums[kStored][t];
  }
}

template <class Config>
__device__ void add_kept(typename Config::Keys& d, const float* kept) {
#pragma unroll
  for (int r = 0; r < Config::MmaState::registers; ++r) d[r] += kept[r * kWarpgroup];
}

template <class Config>
__device__ void keep(const typename Config::Keys& d, float* kept) {
#pragma unroll
  for (int r = 0; r < Config::MmaState::registers; ++r) kept[r * kWarpgroup] = d[r];
}

// A part of a head: dq or dk, with `keep` in memory; a: dP, of the query.
template <bool query, class Config>
__device__ void finish_part(GradientConsumer<Config>& self, const GradientThread<Config>& me, typename Config::Keys& d,
                            const typename Config::Tokens& a, int part, bool add, bool keep_it) {
  if constexpr (query)
    multiply_by_keys(self.shared, d, a, part);
  else
    multiply_by_rows(self.shared, d, part);
  if (!add && !keep_it) return;
  float* const kept = self.accumulators(part, query ? 0 : 1, me.thread);
  if (add) add_kept<Config>(d, kept);
  if (keep_it) keep<Config>(d, kept);
}

// Value head i of `heads`. Leaves dq or dk of the first part in d.
template <bool query, class Config>
__device__ void gradients_of_head(GradientConsumer<Config>& self, const GradientThread<Config>& me,
                                  const GradientItem& at, typename Config::Keys& d, int i, int heads) {
  auto& shared = self.shared;
  const bool kept = Config::parts > 1 || i < heads - 1;
  typename Config::Tokens a;
#pragma unroll
  for (int part = 0; part < Config::parts; ++part) {
    typename Config::Keys stored;
    if constexpr (query)
      part == 0 ? read_values<true>(self, d, a) : read_values<false>(self, d, a);
    else
      part == 0 ? read_values<true>(self, d, stored, a) : read_values<false>(self, d, stored, a);
    if (part == 0) {
      if (i == 0) wait_for_rows(self, at.count);
      shared.vectors_loaded.wait(self.head);
    }
    typename Config::Tokens x;
    if constexpr (query) {
      if (part == 0) multiply_rows<Config>(x, shared.q, shared.k);  // Q Kᵀ   [C, C], beside the sums
      finish_reading(me, d, part);
    } else {
      finish_reading(me, d, stored, part);
      if (part == 0) multiply_rows<Config>(x, shared.k, shared.k);  // K Kᵀ   [C, C]
    }
    if (part == 0) {
      square_products<query>(me, a, x);
      sync_consumers();
    }
    finish_part<query>(self, me, d, a, part, i > 0, kept);
  }
  if (query && me.thread / 32 == 0) shared.through_summed.wait(self.head);
  sync_consumers();
  if (query && me.thread / 32 == 0) store_gates(self.p, me, at, at.hk * heads + i);
  self.head.flip();
}

// dq or dk of the row in memory: with l2norm (d - xn <xn, d>) / |x|.
template <bool query, class Config>
__device__ void store_rows(GradientConsumer<Config>& self, const GradientThread<Config>& me, const GradientItem& at,
                           typename Config::Keys& d) {
  using Tile = typename Config::OutputRows;
  using Element = typename Config::Element;
  const char* const rows = query ? self.shared.q : self.shared.k;
  const GradientArguments& p = self.p;
  float inverse[2], along[2] = {};
#pragma unroll
  for (int e = 0; e < 2; ++e) inverse[e] = query ? me.of_query(me.row(e)) : me.of_key(me.row(e));
  const AccumulatorPlace<typename Config::Rows> place(opaque(me.thread));
  const auto take = [&](int part) {
    if constexpr (Config::parts > 1) clear(d), add_kept<Config>(d, self.accumulators(part, query ? 0 : 1, me.thread));
  };
  if (me.l2norm) {
#pragma unroll 1
    for (int part = 0; part < Config::parts; ++part) {
      take(part);
      const float2 dots = dots_with_rows<Config>(rows, d, part, me.thread);
      along[0] += dots.x * inverse[0] * inverse[0], along[1] += dots.y * inverse[1] * inverse[1];
    }
  }
  char* const tile = self.shared.output[query ? 0 : 1];
#pragma unroll 1
  for (int part = 0; part < Config::parts; ++part) {
    take(part);
    if (me.l2norm)
#pragma unroll
      for (int r = 0; r < Config::MmaState::registers; r += 2) {
        const int e = r / 2 % 2;
        const float2 x =
            unpack<Element>(*reinterpret_cast<const uint32_t*>(rows + Config::part_bytes * part + place.at(r)));
        d[r] = (d[r] - x.x * along[e]) * inverse[e], d[r + 1] = (d[r + 1] - x.y * along[e]) * inverse[e];
      }
    if (part > 0) named_barrier_sync(query ? 1 : 2, kWarpgroup);
    put_rows<Tile, Element>(tile, d, me.thread);
    named_barrier_sync(query ? 1 : 2, kWarpgroup);
    constexpr int units = Config::P / 8;
    uint16_t* const to = static_cast<uint16_t*>(query ? p.dq : p.dk) +
                         ((at.row * p.plan.T + at.token) * p.Hk + at.hk) * Config::K + part * Config::P;
#pragma unroll 1
    for (int u = me.thread; u < at.count * units; u += kWarpgroup)
      __stcs(reinterpret_cast<uint4*>(to + u / units * p.Hk * Config::K + u % units * 8),
             *reinterpret_cast<const uint4*>(tile + Tile::offset(u / units, u % units * 8)));
  }
}

template <bool query, class Config>
__device__ void gradients_of_items(const GradientArguments& p, GradientShared<Config>& shared) {
  GradientConsumer<Config> self{.p = p, .shared = shared};
  const int heads = static_cast<int>(p.H / p.Hk);
  for_each_item(p, [&](const GradientItem& at) {
    const GradientThread<Config> me{.shared = shared,
                                    .l2norm = p.l2norm,
                                    .scale = p.scale,
                                    .thread = static_cast<int>(threadIdx.x % kWarpgroup),
                                    .count = at.count};
    typename Config::Keys d;
#pragma unroll 1
    for (int i = 0; i < heads; ++i) {
      gradients_of_head<query>(self, me, at, d, i, heads);
      if (i == heads - 1) store_rows<query>(self, me, at, d);
      __syncwarp();
      if (threadIdx.x % 32 == 0) shared.head_done.arrive();
    }
    if (threadIdx.x % 32 == 0) shared.rows_read.arrive();
  });
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1)
    chunk_gradients_kernel(const __grid_constant__ GradientArguments p, const __grid_constant__ GradientMaps maps) {
  extern __shared__ __align__(kTileAlign) char memory[];
  auto& shared = *reinterpret_cast<GradientShared<Config>*>(memory);
  constexpr int warps = Config::consumers / 32;
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.grad_o, &maps.dv}) prefetch_tensormap(*map);
    shared.through[Config::dot_warps] = 0;
    shared.ring.init(warps + Config::dot_warps);
    shared.rows_loaded.init(1), shared.vectors_loaded.init(1);
    shared.rows_read.init(warps), shared.head_done.init(warps), shared.through_summed.init(Config::dot_warps);
    fence_mbarrier_init();
  }
  griddepcontrol_wait();
  __syncthreads();
  griddepcontrol_launch_dependents();
  const int group = warp_index() / 4;
  if (group == 0) {
    setmaxnreg_dec<40>();
    if (warp_index() > 0)
      dot_states(p, shared);
    else if (elect_one())
      load_items(p, maps, shared);
  } else {
    setmaxnreg_inc<232>();
    group == 1 ? gradients_of_items<true>(p, shared) : gradients_of_items<false>(p, shared);
  }
}

template <class Config>
void launch_gradients_kernel(const GradientArguments& p, const GradientMaps& maps, int ctas, cudaStream_t stream) {
  static_assert(sizeof(GradientShared<Config>) <= kMaxSharedMemoryPerBlock);
  launch(kChunkBackwardOp,
         {.grid = dim3(static_cast<unsigned>(ctas)),
          .threads = Config::threads,
          .shared_bytes = static_cast<int>(sizeof(GradientShared<Config>)),
          .programmatic = true},
         stream, chunk_gradients_kernel<Config>, p, maps);
}

}  // namespace jet::hopper
