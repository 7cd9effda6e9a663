// `sweep`: the state through the chunks of a sequence (the inter-chunk recurrence), and the outputs. In the names of
// flash-linear-attention: chunk_fwd_h and chunk_fwd_o in one, with the states of chunks in registers. W and U of the
// WY representation (recompute_w_u) are not formed: R takes their place. docs/chunk_gated_delta_rule.md has the data
// sheet.
//
// A CTA has one sequence, one value head and a slice of 128 value columns. One thread loads; three warps turn the rows
// of q and k into fp16 of norm 1, in place; two consumer warpgroups have 64 value columns each and keep S^T [64, K] in
// fp32 accumulators. Per chunk, with S^T, R^T, U^T always on the left, as A operands from registers:
//   S^T Kn^T, O = S^T Qn^T         [64, C]
//   R  = V^T - e^{c_j} |k_j| S^T Kn^T
//   U' = R T'^T
//   O  = scale |q_i| (e^{c_i} O + U' P'^T)
//   S  = e^{c_C} S + (beta_j e^{c_C - c_j} |k_j| U') Kn
#pragma once

#include "csrc/gated_delta_rule/chunk/sweep_producer.cuh"
#include "csrc/hopper/launch.h"
#include "csrc/hopper/mma.h"
#include "csrc/hopper/warp_specialization.h"

namespace jet::hopper {

struct SweepThread {
  int group, thread;  // consumer warpgroup, thread of it
  int column;         // the warpgroup's first value column
};

// S^T [64, K] of the warpgroup from or to S [K, values]. Columns beyond `values` are zero and not stored: V and K are
// multiples of 16, so that they are whole warps'. Registers 4 i .. 4 i + 3 are (k, v), (k + 1, v), (k, v + 8), (k + 1,
// v + 8), k = 8 i + a thread's own.
__device__ inline bool has_columns(const SweepWork& work, const SweepThread& me) {
  return me.column + me.thread / 32 * 16 < work.values;
}

template <class Config>
__device__ void load_state(typename Config::State& s, const SweepWork& work, const SweepThread& me) {
  const int k = accumulator_column(me.thread, 0), v = me.column + accumulator_row(me.thread, 0);
#pragma unroll
  for (int r = 0; r < Config::MmaState::registers; ++r) s[r] = 0;
  if (!has_columns(work, me)) return;
  if (work.is_transfer()) {
#pragma unroll
    for (int r = 0; r < Config::MmaState::registers; ++r)
      s[r] = accumulator_column(me.thread, r) == me.column + accumulator_row(me.thread, r) ? 1 : 0;
  } else if (work.initial == InitialState::memory) {
    const int64_t next_k = work.strides.k, v_8 = 8 * work.strides.v;
    const auto load = [&](const auto* from) {
      const auto* at = from + k * next_k + v * work.strides.v;
#pragma unroll
      for (int r = 0; r < Config::MmaState::registers; r += 4, at += 8 * next_k) {
        s[r] = at[0], s[r + 1] = at[next_k];
        s[r + 2] = at[v_8], s[r + 3] = at[next_k + v_8];
      }
    };
    if ((Config::pooled || Config::cuts) && work.is_bf16)
      load(static_cast<const __nv_bfloat16*>(work.initial_state));
    else
      load(static_cast<const float*>(work.initial_state));
  }
}

// The same to a row of a pool.
template <class Config>
__device__ void store_mark(const typename Config::State& s, const StatePool& pool, const SweepWork& work,
                           const SweepThread& me, int row) {
  if (!has_columns(work, me)) return;
  const StateStrides& strides = pool.strides;
  const int64_t next_k = strides.k, v_8 = 8 * strides.v;
  const int64_t first = row * strides.n + work.h * strides.h + accumulator_column(me.thread, 0) * next_k +
                        (me.column + accumulator_row(me.thread, 0)) * strides.v;
  const auto store = [&](auto* at) {
#pragma unroll
    for (int r = 0; r < Config::MmaState::registers; r += 4, at += 8 * next_k) {
      at[0] = s[r], at[next_k] = s[r + 1];
      at[v_8] = s[r + 2], at[next_k + v_8] = s[r + 3];
    }
  };
  if (pool.dtype == Dtype::bf16)
    store(static_cast<__nv_bfloat16*>(pool.data) + first);
  else
    store(static_cast<float*>(pool.data) + first);
}

template <class Config>
__device__ void store_state(const typename Config::State& s, const SweepWork& work, const SweepThread& me) {
  if (work.final_state == nullptr || !has_columns(work, me)) return;
  const int values = work.values;
  float* at = work.final_state + accumulator_column(me.thread, 0) * values + me.column + accumulator_row(me.thread, 0);
#pragma unroll
  for (int r = 0; r < Config::MmaState::registers; r += 4, at += 8 * values) {
    at[0] = s[r], at[values] = s[r + 1];
    at[8] = s[r + 2], at[values + 8] = s[r + 3];
  }
  if (!Config::cuts || work.transposed == nullptr) return;
  float* row =
      work.transposed + (me.column + accumulator_row(me.thread, 0)) * Config::K + accumulator_column(me.thread, 0);
#pragma unroll
  for (int r = 0; r < Config::MmaState::registers; r += 4, row += 8) {
    *reinterpret_cast<float2*>(row) = make_float2(s[r], s[r + 1]);
    *reinterpret_cast<float2*>(row + 8 * Config::K) = make_float2(s[r + 2], s[r + 3]);
  }
}

// Factors of the accumulator columns of registers r, r + 1.
__device__ inline float2 columns_of(const float* vector, int thread, int r) {
  return *reinterpret_cast<const float2*>(vector + accumulator_column(thread, r));
}

// d = S^T rows^T   [64, C]
template <class Config>
struct StateProduct {
  typename Config::Tokens& d;
  typename Config::RowsOperand rows;
};

template <class Config>
__device__ void multiply_fragments(const StateProduct<Config>& product, const uint32_t (&a)[Config::state_steps][4],
                                   int step) {
  using Mma = typename Config::Mma;
#pragma unroll
  for (int i = 0; i < Config::state_steps; ++i)
    Mma::rs(product.d, a[i], product.rows.at(0, (step + i) * Mma::K), step + i > 0);
  wgmma_commit_group();
}

// All products with S^T as A operand, in as many pieces as registers allow; the last of each is in flight on return.
template <class Config, class... Products>
__device__ void multiply_state(uint32_t (&a)[Config::state_steps][4], const typename Config::State& s,
                               const Products&... products) {
#pragma unroll
  for (int step = 0; step < Config::K / Config::Mma::K; step += Config::state_steps) {
    if (step > 0) {
      wgmma_wait_group<0>();
      (wgmma_fence_operand(products.d), ...);
      wgmma_hold_operand(a);
    }
#pragma unroll
    for (int i = 0; i < Config::state_steps; ++i)
      accumulator_to_a_fragment<typename Config::Operand>(a[i], s, step + i);
    wgmma_fence(a);
    (multiply_fragments(products, a, step), ...);
  }
}

// R = V^T - e^{c_j} |k_j| SK as an A operand.
template <class Config, class Element>
__device__ void residual(uint32_t (&r)[kSteps][4], const typename Config::Tokens& sk, const SweepStage<Config>& stage,
                         const SweepThread& me) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if constexpr (Config::few_registers) __syncwarp();  // loads of later steps must not come before this
    uint32_t v[4];
    const int token = step * kStep + ldmatrix_trans_k(me.thread);
    ldmatrix_x4_trans(v, stage.v[me.group] + ValueTile::offset(ldmatrix_trans_m(me.thread), token));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 2 * kStep / 4 * step + 2 * i;
      const float2 read = columns_of(stage.vectors[kReadK], me.thread, at);
      const float2 value = unpack<Element>(v[i]);
      r[step][i] = pack<f16>(value.x - read.x * sk[at], value.y - read.y * sk[at + 1]);
    }
  }
}

// U' for the outputs and beta_j e^{c_C - c_j} |k_j| U' for the state, as A operands.
template <class Config>
__device__ void updates(uint32_t (&u)[kSteps][4], uint32_t (&write)[kSteps][4], const typename Config::Tokens& x,
                        const SweepStage<Config>& stage, int thread) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if constexpr (Config::few_registers) __syncwarp();
    accumulator_to_a_fragment<f16>(u[step], x, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 2 * kStep / 4 * step + 2 * i;
      const float2 to_state = columns_of(stage.vectors[kWrite], thread, at);
      write[step][i] = pack<f16>(to_state.x * x[at], to_state.y * x[at + 1]);
    }
  }
}

// Rows of the output, scale |q_i| (..), in their own type. With l2norm |q_i| is 1, and shared memory, which bounds the
// chunk, is not read.
template <class Config, class Element>
__device__ void pack_output(uint32_t (&y)[kSteps][4], const typename Config::Tokens& o, const SweepArguments& p,
                            const SweepStage<Config>& stage, int thread) {
  const auto pack_all = [&](const auto& factor_of) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 2 * kStep / 4 * step + 2 * i;
        const float2 factor = factor_of(at);
        y[step][i] = pack<Element>(o[at] * factor.x, o[at + 1] * factor.y);
      }
  };
  if (p.l2norm)
    pack_all([&](int) { return make_float2(p.scale, p.scale); });
  else
    pack_all([&](int at) { return columns_of(stage.vectors[kOutput], thread, at); });
}

// The warpgroup's output tile [C, 64] in shared memory, as the copy engine and every thread of the warpgroup see it.
template <class Config>
__device__ char* stage_output(const uint32_t (&y)[kSteps][4], SweepShared<Config>& shared, const SweepThread& me) {
  char* tile = shared.o[me.group];
  if (me.thread == 0) cp_async_bulk_wait_group_read<0>();
  named_barrier_sync(1 + me.group, kWarpgroup);
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    stmatrix_x4_trans(tile + ValueTile::offset(ldmatrix_trans_m(me.thread), step * kStep + ldmatrix_trans_k(me.thread)),
                      y[step]);
  fence_proxy_async();
  named_barrier_sync(1 + me.group, kWarpgroup);
  return tile;
}

// The output of a chunk of C tokens.
template <class Config>
__device__ void store_output(const uint32_t (&y)[kSteps][4], const SweepMaps& maps, const SweepWork& work,
                             SweepShared<Config>& shared, const SweepThread& me, int chunk) {
  const char* tile = stage_output<Config>(y, shared, me);
  if (me.thread == 0) {
    tma_store(maps.o, tile, me.column, work.h, static_cast<int>(work.token + int64_t{chunk} * C),
              static_cast<int>(work.row));
    cp_async_bulk_commit_group();
  }
}

// The output of the last chunk, which may end before its 64th token: behind it lies the next sequence's.
template <class Config>
__device__ void store_last_output(const uint32_t (&y)[kSteps][4], const SweepArguments& p, const SweepMaps& maps,
                                  const SweepWork& work, SweepShared<Config>& shared, const SweepThread& me) {
  const int chunk = work.chunks - 1, count = work.count(chunk);
  if (count == C) return store_output<Config>(y, maps, work, shared, me, chunk);
  const char* tile = stage_output<Config>(y, shared, me);
  constexpr int unit = 8, row_units = kRows / unit;
  const int v = me.thread % row_units * unit;
  if (me.column + v >= work.values) return;
  const int64_t token = work.token + int64_t{chunk} * C;
#pragma unroll 1
  for (int i = me.thread / row_units; i < count; i += kWarpgroup / row_units)
    *reinterpret_cast<uint4*>(p.o + ((work.row * p.plan.T + token + i) * p.H + work.h) * p.V + me.column + v) =
        *reinterpret_cast<const uint4*>(tile + ValueTile::offset(v, i));
}

// An accumulator [64, steps * 16] of the warpgroup, rounded, into a tile of 64 value columns.
template <class Tile, class Element, int steps, int registers>
__device__ void put_values(char* tile, const float (&x)[registers], int thread) {
  const int column = ldmatrix_trans_m(thread), row = ldmatrix_trans_k(thread);
#pragma unroll
  for (int step = 0; step < steps; ++step) {
    uint32_t words[4];
    accumulator_to_a_fragment<Element>(words, x, step);
    stmatrix_x4_trans(tile + Tile::offset(column, step * kStep + row), words);
  }
}

// S before a chunk into the warpgroup's tile in shared memory.
template <class Config, class Element>
__device__ void put_chunk_state(const typename Config::State& s, SweepShared<Config>& shared, const SweepThread& me) {
  if (me.thread == 0) cp_async_bulk_wait_group_read<0>();
  named_barrier_sync(1 + me.group, kWarpgroup);
  put_values<typename Config::StateImage, Element, Config::K / kStep>(shared.state[me.group], s, me.thread);
}

// The warpgroup's tile of a chunk to global memory, beside those of its other value columns; one thread.
template <class Tile>
__device__ void store_tile(char* tiles, const char* tile, const SweepArguments& p, const SweepWork& work,
                           const SweepThread& me, int chunk) {
  const int64_t at = ((work.first_chunk + chunk) * p.H + work.h) * value_tiles(p.V) + me.column / kRows;
  cp_async_bulk_store(tiles + at * Tile::bytes, tile, Tile::bytes);
}

// U' of a chunk behind its S0, both to global memory.
template <class Config, class Element>
__device__ void store_state_and_update(const typename Config::Tokens& u, const SweepArguments& p, const SweepWork& work,
                                       SweepShared<Config>& shared, const SweepThread& me, int chunk) {
  put_values<ValueTile, Element, kSteps>(shared.o[me.group], u, me.thread);
  fence_proxy_async();
  named_barrier_sync(1 + me.group, kWarpgroup);
  if (me.thread != 0) return;
  store_tile<typename Config::StateImage>(p.chunk_states, shared.state[me.group], p, work, me, chunk);
  store_tile<ValueTile>(p.chunk_updates, shared.o[me.group], p, work, me, chunk);
  cp_async_bulk_commit_group();
}

// S = e^{c_C} S, once S^T has become an A operand.
template <class Config>
__device__ void decay_state(typename Config::State& s, const SweepStage<Config>& stage) {
  const float decay = stage.vectors[kReadQ][C - 1];
#pragma unroll
  for (int at = 0; at < Config::MmaState::registers; ++at) s[at] *= decay;
}

// y: the output of the chunk before on entry, of this one on return; it is stored behind U' of the next chunk, or where
// registers are few behind its first products.
template <class Config>
__device__ void sweep_chunk(typename Config::State& s, uint32_t (&y)[kSteps][4], const SweepArguments& p,
                            const SweepMaps& maps, const SweepWork& work, SweepShared<Config>& shared,
                            const SweepStage<Config>& stage, const SweepThread& me, int chunk) {
  using Mma = typename Config::Mma;
  using MmaState = typename Config::MmaState;
  const SquareOperand t(stage.t), pp(stage.p);
  const typename Config::ColumnsOperand k(stage.k);
  typename Config::Tokens x, o;
  const StateProduct<Config> sk{x, typename Config::RowsOperand(stage.k)}, sq{o, typename Config::RowsOperand(stage.q)};
  uint32_t a[Config::state_steps][4], r[kSteps][4];
  if constexpr (Config::outputs) {
    multiply_state<Config>(a, s, sk, sq);  // X = Sᵀ Knᵀ, O = Sᵀ Qnᵀ   [64, C]
    decay_state<Config>(s, stage);
    if (Config::few_registers && chunk > 0) store_output<Config>(y, maps, work, shared, me, chunk - 1);
  } else {
    if constexpr (Config::states) {  // behind the products ptxas would have it wait for X
      if (p.dtype == Dtype::bf16)
        put_chunk_state<Config, bf16>(s, shared, me);
      else
        put_chunk_state<Config, f16>(s, shared, me);
    }
    multiply_state<Config>(a, s, sk);
  }
  wgmma_wait_group<Config::outputs && Config::o_behind_residual ? 1 : 0>();
  wgmma_fence_operand(x);
  if constexpr (!Config::o_behind_residual) wgmma_fence_operand(o), wgmma_hold_operand(a);
  if (p.dtype == Dtype::bf16)
    residual<Config, bf16>(r, x, stage, me);
  else
    residual<Config, f16>(r, x, stage, me);
  wgmma_fence(r);
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    Mma::rs(x, r[step], t.at(0, step * Mma::K), step > 0);  // U' = R T'ᵀ   [64, C]
  wgmma_commit_group();
  if constexpr (Config::outputs) {
    if constexpr (Config::o_behind_residual) {
      wgmma_wait_group<1>();
      wgmma_fence_operand(o);
      wgmma_hold_operand(a);
    }
#pragma unroll
    for (int at = 0; at < Mma::registers; at += 2) {
      const float2 read = columns_of(stage.vectors[kReadQ], me.thread, at);
      o[at] *= read.x, o[at + 1] *= read.y;
    }
    if (!Config::few_registers && chunk > 0) store_output<Config>(y, maps, work, shared, me, chunk - 1);
  } else {
    decay_state<Config>(s, stage);  // earlier, ptxas would have it wait for X
  }
  wgmma_wait_group<0>();
  wgmma_fence_operand(x);
  wgmma_hold_operand(r);
  if constexpr (!Config::outputs && Config::o_behind_residual) wgmma_hold_operand(a);
  if constexpr (Config::states) {
    if (p.dtype == Dtype::bf16)
      store_state_and_update<Config, bf16>(x, p, work, shared, me, chunk);
    else
      store_state_and_update<Config, f16>(x, p, work, shared, me, chunk);
  }
  uint32_t u[kSteps][4], write[kSteps][4];
  updates<Config>(u, write, x, stage, me.thread);
  if constexpr (Config::outputs) {
    wgmma_fence(o, s, u, write);
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      Mma::rs(o, u[step], pp.at(0, step * Mma::K), true);  // O += U' P'ᵀ   [64, C]
    wgmma_commit_group();
  } else {
    wgmma_fence(s, write);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    MmaState::rs(s, write[step], k.at(0, step * Mma::K), true);  // Sᵀ += (..U')ᵀ Kn   [64, K]
  wgmma_commit_group();
  if constexpr (Config::outputs) {
    wgmma_wait_group<1>();
    wgmma_fence_operand(o);
    wgmma_hold_operand(u);
    if (p.dtype == Dtype::bf16)
      pack_output<Config, bf16>(y, o, p, stage, me.thread);
    else
      pack_output<Config, f16>(y, o, p, stage, me.thread);
  }
  wgmma_wait_group<0>();
  wgmma_fence_operand(s);
  wgmma_hold_operand(write);
}

template <class Config>
__device__ void sweep_chunks(const SweepArguments& p, const SweepMaps& maps, const SweepWork& work,
                             SweepShared<Config>& shared) {
  const int group = threadIdx.x / kWarpgroup - 1;
  if (group >= work.groups) return;
  const SweepThread me{group, static_cast<int>(threadIdx.x % kWarpgroup), work.column + group * kRows};
  typename Config::State s;
  uint32_t y[kSteps][4] = {};
  load_state<Config>(s, work, me);
#pragma unroll 1
  for (int chunk = 0; chunk < work.chunks; ++chunk) {
    const int stage = chunk % Config::stages;
    const PhaseParity parity = parity_of<Config>(chunk);
    shared.ring.full[stage].wait(parity);  // is complete; a thread must have seen that before it reads what was copied
    shared.normalised[stage].wait(parity);
    sweep_chunk<Config>(s, y, p, maps, work, shared, shared.stage[stage], me, chunk);
    if (Config::pooled && p.plan.marks != nullptr)
      if (const int row = shared.mark[stage]; row >= 0) store_mark<Config>(s, p.prefill.pool, work, me, row);
    __syncwarp();
    if (me.thread % 32 == 0) shared.ring.empty[chunk % Config::stages].arrive();
  }
  if (Config::outputs && work.chunks > 0) store_last_output<Config>(y, p, maps, work, shared, me);
  store_state<Config>(s, work, me);
  if (me.thread == 0) cp_async_bulk_wait_group<0>();
}

// By one thread. With cu_seqlens the work is known once the kernel has run that writes the plan.
template <class Config, class Work>
__device__ void set_up(const SweepArguments& p, const SweepMaps& maps, SweepShared<Config>& shared,
                       const Work& work_of_cta) {
  if (p.plan.T > 0)
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.o}) prefetch_tensormap(*map);
  if (p.plan.cu_seqlens.data != nullptr) griddepcontrol_wait();
  const SweepWork work = work_of_cta();
  if (work.groups > 0) shared.ring.init(work.groups * kWarpgroup / 32);
  for (Mbarrier& barrier : shared.normalised) barrier.init(kNormalisers);
  fence_mbarrier_init();
  shared.work = work;
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1)
    chunk_sweep_kernel(const __grid_constant__ SweepArguments p, const __grid_constant__ SweepMaps maps) {
  extern __shared__ __align__(kTileAlign) char memory[];
  auto& shared = *reinterpret_cast<SweepShared<Config>*>(memory);
  const SweepWork& work = shared.work;  // read where it is used: the producer's threads have few registers
  if (threadIdx.x == 0)
    set_up<Config>(p, maps, shared, [&] { return Config::cuts ? cut_work(p) : output_work(p); });
  else if (threadIdx.x >= 32)
    shared.zero_upper_blocks(threadIdx.x - 32, Config::threads - 32);
  fence_proxy_async();
  griddepcontrol_wait();  // in every thread, also where there is no work: who waits for this kernel's end counts
                          // on those before it
  __syncthreads();
  griddepcontrol_launch_dependents();
  if (work.groups == 0) return;
  if (Config::cuts && work.is_transfer()) {
    shared.zero_values();
    __syncthreads();
  }
  if (warp_index() < kWarpgroup / 32) {
    setmaxnreg_dec<Config::producer_registers>();
    if (warp_index() > 0)
      normalise_chunks<Config>(p, work, shared);
    else if (elect_one())
      load_chunks<Config>(p, maps, work, shared);
  } else {
    setmaxnreg_inc<Config::consumer_registers>();
    sweep_chunks<Config>(p, maps, work, shared);
  }
}

template <class Config>
void launch_sweep_kernel(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream) {
  static_assert(sizeof(SweepShared<Config>) <= kMaxSharedMemoryPerBlock);
  const int64_t segments = Config::cuts ? p.plan.most_cuts : p.plan.N + p.plan.most_cuts;
  const int64_t ctas = segments * p.H * (p.slices + (Config::cuts ? transfer_slices(p.K) : 0));
  require(ctas < (int64_t{1} << 31), kChunkOp, "N * H * V / 128", "below 2^31", ctas);
  launch(kChunkOp,
         {.grid = dim3(static_cast<unsigned>(ctas)),
          .threads = Config::threads,
          .shared_bytes = static_cast<int>(sizeof(SweepShared<Config>)),
          .programmatic = true},
         stream, chunk_sweep_kernel<Config>, p, maps);
}

template <bool narrow>
void launch_sweep_part(const SweepArguments& p, const SweepMaps& maps, bool outputs, cudaStream_t stream) {
  HopperHeadDims::dispatch(p.K, [&](auto K) {
    if constexpr ((K <= kMostNarrowK) == narrow) {
      if (outputs && p.prefill.pool.data != nullptr)
        launch_sweep_kernel<SweepConfig<K, SweepPass::pooled>>(p, maps, stream);
      else if (outputs)
        launch_sweep_kernel<SweepConfig<K, SweepPass::outputs>>(p, maps, stream);
      else
        launch_sweep_kernel<SweepConfig<K, SweepPass::cuts>>(p, maps, stream);
    }
  });
}

}  // namespace jet::hopper
