// `sweep`: the state through the chunks of a sequence, and the outputs. docs/chunk_gated_delta_rule.md has the data sheet.
//
// A CTA has one sequence, one value head and a slice of 128 value columns. One thread loads; three warps turn the rows of q and k into fp16
// of norm 1, in place; two consumer warpgroups have 64 value columns each and keep S^T [64, K] in fp32 accumulators. Per chunk, with
// S^T, R^T, U^T always on the left, as A operands from registers:
//   S^T Kn^T, O = S^T Qn^T         [64, C]
//   R  = V^T - e^{c_j} |k_j| S^T Kn^T
//   U' = R T'^T
//   O  = scale |q_i| (e^{c_i} O + U' P'^T)
//   S  = e^{c_C} S + (beta_j e^{c_C - c_j} |k_j| U') Kn
#pragma once

#include "csrc/gated_delta_rule/chunk_sweep_shared.cuh"
#include "csrc/hopper/launch.h"
#include "csrc/hopper/matrix.h"

namespace jet::hopper {

// ---- Producer --------------------------------------------------------------------------------------------------------------

template <class Config>
__device__ void load_chunk(const SweepArguments& p, const SweepMaps& maps, const SweepWork& work, SweepStage<Config>& stage, Event& loaded,
                           int chunk) {
  const int token = static_cast<int>(work.token + int64_t{chunk} * C), row = static_cast<int>(work.row);
  for (int panel = 0; panel < Config::Rows::panels; ++panel) {
    const int column = panel * Config::Rows::panel_width, at = panel * Config::Rows::panel_bytes;
    load(stage.k + at, maps.k, loaded, Reuse::normal, column, work.hk, token, row);
    if constexpr (Config::outputs) load(stage.q + at, maps.q, loaded, Reuse::normal, column, work.hk, token, row);
  }
  for (int group = 0; group < work.groups && !work.is_transfer(); ++group)
    load(stage.v[group], maps.v, loaded, Reuse::once, work.column + group * kRows, work.h, token, row);
  const char* image = p.images + ((work.first_chunk + chunk) * p.H + work.h) * kImageBytes;
  for (int panel = 0; panel < kBlocks; ++panel) {
    bulk_load(stage.t + panel_in_tile(panel), image + panel_in_image(panel), stored_bytes(panel), loaded);
    if constexpr (Config::outputs)
      bulk_load(stage.p + panel_in_tile(panel), image + kTriangleBytes + panel_in_image(panel), stored_bytes(panel), loaded);
  }
  bulk_load(stage.vectors, image + kVectorsAt, kVectors * kVectorBytes, loaded);
}

template <class Config>
__device__ void load_chunks(const SweepArguments& p, const SweepMaps& maps, const SweepWork& work, SweepShared<Config>& shared) {
  Producer<Config::stages> ring(shared.ring);
  const int common = Config::outputs ? 2 * Config::Rows::bytes + kImageBytes : Config::Rows::bytes + kImageBytes - kTriangleBytes;
  const int bytes = common + (work.is_transfer() ? 0 : work.groups * ValueTile::bytes);
  for (int chunk = 0; chunk < work.chunks; ++chunk, ring.advance()) {
    auto& stage = shared.stage[ring.acquire(bytes)];
    load_chunk<Config>(p, maps, work, stage, ring.filled(), chunk);
  }
}

// Zero for the tokens behind the sequence's end, which are the next sequence's.
template <class Config>
__device__ void clear_values(SweepStage<Config>& stage, int count, int thread) {
  constexpr int row_units = ValueTile::row_bytes / 16;
  for (char* tile : stage.v)
    for (int u = count * row_units + thread; u < C * row_units; u += kNormalisers) reinterpret_cast<uint4*>(tile)[u] = make_uint4(0, 0, 0, 0);
}

// Kn, Qn = rows of K, Q over their norms, in fp16 where the rows were; rows behind the sequence's end become zero.
template <class Config>
__device__ void normalise_chunks(const SweepArguments& p, const SweepWork& work, SweepShared<Config>& shared) {
  constexpr int units = Config::Rows::bytes / 16, row_units = Config::Rows::row_bytes / 16;
  const int thread = threadIdx.x - 32;
  for (int chunk = 0; chunk < work.chunks; ++chunk) {
    auto& stage = shared.stage[chunk % Config::stages];
    shared.ring.filled[chunk % Config::stages].wait(parity_of<Config>(chunk));
    const int count = work.count(chunk);
    if (count < C) clear_values<Config>(stage, count, thread);
#pragma unroll Config::producer_unroll
    for (int u = thread; u < (Config::outputs ? 2 : 1) * units; u += kNormalisers) {
      const int row = u / row_units % C;
      const float factor = stage.vectors[u < units ? kInverseK : kInverseQ][row];
      uint4* unit = reinterpret_cast<uint4*>(stage.k) + u;  // q follows k
      const uint4 raw = *unit;
      const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
      uint32_t out[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 x = p.dtype == Dtype::bf16 ? unpack<bf16>(words[w]) : unpack<f16>(words[w]);
        out[w] = row < count ? pack<f16>(x.x * factor, x.y * factor) : 0;
      }
      *unit = make_uint4(out[0], out[1], out[2], out[3]);
    }
    publish_writes_to_async_proxy();
    shared.normalised[chunk % Config::stages].arrive();
  }
}

// ---- Consumers -------------------------------------------------------------------------------------------------------------

struct SweepThread {
  int group, thread;  // consumer warpgroup, thread of it
  int column;         // the warpgroup's first value column
};

// S^T [64, K] of the warpgroup from or to S [K, values]; columns beyond `values` are zero and not stored.
template <class Config>
__device__ void load_state(typename Config::State& s, const SweepWork& work, const SweepThread& me) {
#pragma unroll
  for (int r = 0; r < Config::MmaState::registers; ++r) {
    const int64_t k = accumulator_column(me.thread, r), v = me.column + accumulator_row(me.thread, r);
    s[r] = 0;
    if (work.initial == InitialState::memory && v < work.values) s[r] = __ldg(work.initial_state + k * work.strides.k + v * work.strides.v);
    if (work.is_transfer() && k == v) s[r] = 1;
  }
}

template <class Config>
__device__ void store_state(const typename Config::State& s, const SweepWork& work, const SweepThread& me) {
  if (work.final_state == nullptr) return;
#pragma unroll
  for (int r = 0; r < Config::MmaState::registers; ++r) {
    const int64_t k = accumulator_column(me.thread, r), v = me.column + accumulator_row(me.thread, r);
    if (v < work.values) work.final_state[k * work.values + v] = s[r];
  }
}

// Factors of the accumulator columns of registers r, r + 1.
__device__ inline float2 columns_of(const float* vector, int thread, int r) {
  return *reinterpret_cast<const float2*>(vector + accumulator_column(thread, r));
}

// x = S^T Kn^T and o = S^T Qn^T, with S^T as A operand in as many pieces as registers allow; the last of each is in flight on return.
template <class Config>
__device__ void multiply_state(typename Config::Tokens& x, typename Config::Tokens& o, uint32_t (&a)[Config::state_steps][4],
                               const typename Config::State& s, const SweepStage<Config>& stage) {
  using Mma = typename Config::Mma;
  const typename Config::RowsOperand k(stage.k), q(stage.q);
#pragma unroll
  for (int step = 0; step < Config::K / Mma::K; step += Config::state_steps) {
    if (step > 0) {
      wgmma_wait<0>();
      wgmma_touch(x);
      if constexpr (Config::outputs) wgmma_touch(o);
      hold(a);
    }
#pragma unroll
    for (int i = 0; i < Config::state_steps; ++i) fragment_of<f16>(a[i], s, step + i);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Config::state_steps; ++i) Mma::rs(x, a[i], k.at(0, (step + i) * Mma::K), step + i > 0);  // X = Sᵀ Knᵀ   [64, C]
    wgmma_commit();
    if constexpr (Config::outputs) {
#pragma unroll
      for (int i = 0; i < Config::state_steps; ++i) Mma::rs(o, a[i], q.at(0, (step + i) * Mma::K), step + i > 0);  // O = Sᵀ Qnᵀ   [64, C]
      wgmma_commit();
    }
  }
}

// R = V^T - e^{c_j} |k_j| SK as an A operand.
template <class Config>
__device__ void residual(uint32_t (&r)[kSteps][4], const typename Config::Tokens& sk, const SweepStage<Config>& stage, const SweepThread& me,
                         Dtype dtype) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if constexpr (Config::few_registers) __syncwarp();  // loads of later steps must not come before this
    uint32_t v[4];
    const int token = step * kStep + transposed_k(me.thread);
    load_matrices_transposed(v, stage.v[me.group] + ValueTile::offset(transposed_m(me.thread), token));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 2 * kStep / 4 * step + 2 * i;
      const float2 read = columns_of(stage.vectors[kReadK], me.thread, at);
      const float2 value = dtype == Dtype::bf16 ? unpack<bf16>(v[i]) : unpack<f16>(v[i]);
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
    fragment_of<f16>(u[step], x, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 2 * kStep / 4 * step + 2 * i;
      const float2 to_state = columns_of(stage.vectors[kWrite], thread, at);
      write[step][i] = pack<f16>(to_state.x * x[at], to_state.y * x[at + 1]);
    }
  }
}

// The output tile through shared memory: by TMA, or by threads where the chunk ends before its 64th token.
template <class Config>
__device__ void store_output(const typename Config::Tokens& o, const SweepArguments& p, const SweepMaps& maps, const SweepWork& work,
                             SweepShared<Config>& shared, const SweepStage<Config>& stage, const SweepThread& me, int chunk) {
  char* tile = shared.o[me.group];
  if (me.thread == 0) wait_stores_read<0>();
  sync_threads(1 + me.group, kWarpgroup);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 2 * kStep / 4 * step + 2 * i;
      const float2 factor = columns_of(stage.vectors[kOutput], me.thread, at);
      const float low = o[at] * factor.x, high = o[at + 1] * factor.y;
      y[i] = p.dtype == Dtype::bf16 ? pack<bf16>(low, high) : pack<f16>(low, high);
    }
    const int token = step * kStep + transposed_k(me.thread);
    store_matrices_transposed(tile + ValueTile::offset(transposed_m(me.thread), token), y);
  }
  publish_writes_to_async_proxy();
  sync_threads(1 + me.group, kWarpgroup);
  const int64_t token = work.token + int64_t{chunk} * C;
  const int count = work.count(chunk);
  if (count == C) {
    if (me.thread == 0) {
      store(maps.o, tile, me.column, work.h, static_cast<int>(token), static_cast<int>(work.row));
      commit_stores();
    }
    return;
  }
  constexpr int unit = 8, row_units = kRows / unit;
  const int v = me.thread % row_units * unit;
  if (me.column + v >= work.values) return;
  for (int i = me.thread / row_units; i < count; i += kWarpgroup / row_units)
    *reinterpret_cast<uint4*>(p.o + ((work.row * p.plan.T + token + i) * p.H + work.h) * p.V + me.column + v) =
        *reinterpret_cast<const uint4*>(tile + ValueTile::offset(v, i));
}

template <class Config>
__device__ void sweep_chunk(typename Config::State& s, const SweepArguments& p, const SweepMaps& maps, const SweepWork& work,
                            SweepShared<Config>& shared, const SweepStage<Config>& stage, const SweepThread& me, int chunk) {
  using Mma = typename Config::Mma;
  using MmaState = typename Config::MmaState;
  const SquareOperand t(stage.t), pp(stage.p);
  const typename Config::ColumnsOperand k(stage.k);
  typename Config::Tokens x, o;
  uint32_t a[Config::state_steps][4], r[kSteps][4];
  multiply_state<Config>(x, o, a, s, stage);
  wgmma_wait<Config::outputs ? 1 : 0>();
  wgmma_touch(x);
  residual<Config>(r, x, stage, me, p.dtype);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step) Mma::rs(x, r[step], t.at(0, step * Mma::K), step > 0);  // U' = R T'ᵀ   [64, C]
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_touch(x);
  if constexpr (Config::outputs) wgmma_touch(o);
  hold(a), hold(r);
  uint32_t u[kSteps][4], write[kSteps][4];
  updates<Config>(u, write, x, stage, me.thread);
  if constexpr (Config::outputs) {
#pragma unroll
    for (int at = 0; at < Mma::registers; at += 2) {
      const float2 read = columns_of(stage.vectors[kReadQ], me.thread, at);
      o[at] *= read.x, o[at + 1] *= read.y;
    }
  }
  const float decay = stage.vectors[kReadQ][C - 1];
#pragma unroll
  for (int at = 0; at < MmaState::registers; ++at) s[at] *= decay;
  wgmma_fence();
  if constexpr (Config::outputs) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) Mma::rs(o, u[step], pp.at(0, step * Mma::K), true);  // O += U' P'ᵀ   [64, C]
    wgmma_commit();
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) MmaState::rs(s, write[step], k.at(0, step * Mma::K), true);  // Sᵀ += (..U')ᵀ Kn   [64, K]
  wgmma_commit();
  if constexpr (Config::outputs) {
    wgmma_wait<1>();
    wgmma_touch(o);
    hold(u);
    store_output<Config>(o, p, maps, work, shared, stage, me, chunk);
  }
  wgmma_wait<0>();
  wgmma_touch(s);
  hold(write);
}

template <class Config>
__device__ void sweep_chunks(const SweepArguments& p, const SweepMaps& maps, const SweepWork& work, SweepShared<Config>& shared) {
  const int group = threadIdx.x / kWarpgroup - 1;
  if (group >= work.groups) return;
  const SweepThread me{group, static_cast<int>(threadIdx.x % kWarpgroup), work.column + group * kRows};
  typename Config::State s;
  load_state<Config>(s, work, me);
#pragma unroll 1
  for (int chunk = 0; chunk < work.chunks; ++chunk) {
    const int stage = chunk % Config::stages;
    const Parity parity = parity_of<Config>(chunk);
    shared.ring.filled[stage].wait(parity);  // has happened; this thread must have seen it before it reads what was copied
    shared.normalised[stage].wait(parity);
    sweep_chunk<Config>(s, p, maps, work, shared, shared.stage[stage], me, chunk);
    __syncwarp();
    if (me.thread % 32 == 0) shared.ring.read[chunk % Config::stages].arrive();
  }
  store_state<Config>(s, work, me);
  if (me.thread == 0) wait_stores_done<0>();
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1)
    chunk_sweep_kernel(const __grid_constant__ SweepArguments p, const __grid_constant__ SweepMaps maps) {
  extern __shared__ __align__(kTileAlign) char memory[];
  auto& shared = *reinterpret_cast<SweepShared<Config>*>(memory);
  const SweepWork& work = shared.work;  // read where it is used: the producer's threads have few registers
  if (threadIdx.x == 0) {
    shared.work = Config::outputs ? output_work(p) : cut_work(p);
    if (work.groups > 0) shared.ring.init(work.groups * kWarpgroup / 32);
    for (Event& event : shared.normalised) event.init(kNormalisers);
    publish_inits();
  }
  __syncthreads();
  if (work.groups == 0) return;
  shared.zero_upper_blocks();
  if (work.is_transfer()) shared.zero_values();
  publish_writes_to_async_proxy();
  __syncthreads();
  if (warp_index() < kWarpgroup / 32) {
    give_registers_back<Config::producer_registers>();
    if (warp_index() > 0)
      normalise_chunks<Config>(p, work, shared);
    else if (elected())
      load_chunks<Config>(p, maps, work, shared);
  } else {
    take_registers<Config::consumer_registers>();
    sweep_chunks<Config>(p, maps, work, shared);
  }
}

template <class Config>
void launch_sweep(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream) {
  const int64_t segments = Config::outputs ? p.plan.N + p.plan.most_cuts : p.plan.most_cuts;
  const int64_t ctas = segments * p.H * (p.slices + (Config::outputs ? 0 : transfer_slices(p.K)));
  require(ctas < (int64_t{1} << 31), "chunk_gated_delta_rule", "N * H * V / 128", "below 2^31", ctas);
  launch("chunk_gated_delta_rule", {dim3(static_cast<unsigned>(ctas)), Config::threads, static_cast<int>(sizeof(SweepShared<Config>))}, stream,
         chunk_sweep_kernel<Config>, p, maps);
}

}  // namespace jet::hopper
