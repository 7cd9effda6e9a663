// `replay`: the value columns whose final state is not finite once more, token by token in fp32 from the initial state.
//
// In a chunk a NaN reaches tokens before its own, as zeros above the diagonals are multiplied by it. Once in the state
// it stays, 0 NaN being NaN, and U_j k_j^T spreads it over all rows of its columns: a look at one row of the final
// state finds it. Infinities and numbers that fp16 does not hold are found alike. A CTA has a sequence, a value head
// and 128 columns, one for each thread, whose state is kept in final_state. Those of a prefill go on to the pool from
// there; until then its rows are the initial states.
#pragma once

#include "csrc/gated_delta_rule/chunk/plan.cuh"
#include "csrc/gated_delta_rule/head_dims.h"
#include "csrc/hopper/launch.h"

namespace jet::hopper {

struct ReplayArguments {
  ChunkPlan plan;
  ChunkGatedDeltaRuleParams p;
  PrefillStates prefill;
  int slices;  // of a value head
};

constexpr int kReplayThreads = 128;
constexpr int kReplayBatch = 8;  // rows of the state under way at a time
static_assert(HopperHeadDims::all([](auto K) { return K % kReplayBatch == 0; }));

// A token's row of q or k in shared memory, over its norm with l2norm; by one warp.
__device__ inline void load_token_row(float* row, const GatedDeltaRuleInputs& in, const TokenTensor& x, int64_t at) {
  const int lane = threadIdx.x % 32;
  float squares = 0;
  for (int i = lane; i < in.K; i += 32) {
    const float element = load_as_float(x.data, x.dtype, at + i * x.strides.d);
    row[i] = element, squares += element * element;
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) squares += __shfl_xor_sync(0xffffffffu, squares, distance);
  if (in.l2norm_qk)
    for (int i = lane; i < in.K; i += 32) row[i] *= rsqrtf(squares + float(kL2NormEps));
}

// S <- body(S, i) for the rows i of a thread's column.
template <class Body>
__device__ void for_each_row(float* state, int64_t K, int64_t V, const Body& body) {
#pragma unroll 1
  for (int i = 0; i < K; i += kReplayBatch, state += kReplayBatch * V) {
    float s[kReplayBatch];
#pragma unroll
    for (int j = 0; j < kReplayBatch; ++j) s[j] = state[j * V];
#pragma unroll
    for (int j = 0; j < kReplayBatch; ++j) state[j * V] = body(s[j], i + j);
  }
}

// Of a thread: a column of a state.
struct ReplayColumn {
  int64_t n, h, v;
  float* state;  // in final_state, rows V apart
};

// A column to a row of the pool.
__device__ inline void put_column(const StatePool& pool, const ReplayColumn& at, int64_t row, int64_t K, int64_t V) {
  const StateStrides& s = pool.strides;
  for (int64_t i = 0; i < K; ++i)
    store_from_float(pool.data, pool.dtype, row * s.n + at.h * s.h + i * s.k + at.v * s.v, at.state[i * V]);
}

// `mine`: whether this thread's column is one of those. All threads of the CTA take part.
template <bool on_pool>
__device__ void replay_columns(const ReplayArguments& a, const Sequence& sequence, const ReplayColumn& at, bool mine) {
  __shared__ float q[HopperHeadDims::most], k[HopperHeadDims::most];
  const ChunkGatedDeltaRuleParams& p = a.p;
  const GatedDeltaRuleInputs& in = p.in;
  const StatePool& pool = a.prefill.pool;
  const int64_t hk = quotient(at.h, quotient(in.H, in.Hk));
  const int64_t row = on_pool ? initial_row(a.prefill, at.n) : p.initial_state.data == nullptr ? -1 : at.n;
  const void* const initial = on_pool ? pool.data : p.initial_state.data;
  const StateStrides& from = on_pool ? pool.strides : p.initial_state.strides;
  if (mine)
    for_each_row(at.state, in.K, in.V, [&](float, int i) {
      return row < 0 ? 0.f
                     : load_as_float(initial, on_pool ? pool.dtype : Dtype::f32,
                                     row * from.n + at.h * from.h + at.v * from.v + i * from.k);
    });
  const auto element = [&](const TokenStrides& s, int64_t token, int64_t head) {
    return sequence.row * s.b + token * s.t + head * s.h;
  };
#pragma unroll 1
  for (int64_t i = 0; i < sequence.length; ++i) {
    const int64_t token = sequence.begin + i;
    __syncthreads();
    if (threadIdx.x / 32 == 0) load_token_row(q, in, in.q, element(in.q.strides, token, hk));
    if (threadIdx.x / 32 == 1) load_token_row(k, in, in.k, element(in.k.strides, token, hk));
    __syncthreads();
    if (!mine) continue;
    const float decay = expf(static_cast<const float*>(in.g.data)[element(in.g.strides, token, at.h)]);
    const float beta = static_cast<const float*>(in.beta.data)[element(in.beta.strides, token, at.h)];
    float predicted = 0, read = 0;
    for_each_row(at.state, in.K, in.V,
                 [&](float s, int j) { return predicted = fmaf(decay * s, k[j], predicted), decay * s; });
    const int64_t value = element(in.v.strides, token, at.h) + at.v * in.v.strides.d;
    const float u = beta * (load_as_float(in.v.data, in.v.dtype, value) - predicted);
    for_each_row(at.state, in.K, in.V, [&](float s, int j) {
      s = fmaf(k[j], u, s);
      return read = fmaf(s, q[j], read), s;
    });
    store_from_float(p.o, in.v.dtype, ((sequence.row * in.T + token) * in.H + at.h) * in.V + at.v,
                     read * static_cast<float>(in.scale));
    if (!on_pool || a.plan.marks == nullptr || ((i + 1) % C != 0 && i + 1 != sequence.length)) continue;
    if (const int mark = a.plan.marks[sequence.first_chunk + i / C]; mark >= 0) put_column(pool, at, mark, in.K, in.V);
  }
}

constexpr int kPutRows = 32;
static_assert(HopperHeadDims::all([](auto K) { return K % kPutRows == 0; }));

// The final state's columns to the sequence's row of the pool. Where rows are side by side in memory (V before K) they
// change places in shared memory, so that a warp writes 32 of them.
__device__ inline void put_columns(const StatePool& pool, const ReplayColumn& at, int64_t row, int64_t K, int64_t V) {
  __shared__ float tile[kPutRows][kReplayThreads + 1];
  const StateStrides& s = pool.strides;
  if (s.k != 1) {
    if (at.v < V) put_column(pool, at, row, K, V);
    return;
  }
  const int64_t first = at.v - threadIdx.x, head = row * s.n + at.h * s.h;
  for (int64_t i = 0; i < K; i += kPutRows) {
    __syncthreads();
    if (at.v < V)
      for (int j = 0; j < kPutRows; ++j) tile[j][threadIdx.x] = at.state[(i + j) * V];
    __syncthreads();
    const int lane = threadIdx.x % 32;
    for (int column = threadIdx.x / 32; column < kReplayThreads && first + column < V; column += kReplayThreads / 32)
      store_from_float(pool.data, pool.dtype, head + (first + column) * s.v + i + lane, tile[lane][column]);
  }
}

template <bool on_pool>
__global__ void __launch_bounds__(kReplayThreads) chunk_replay_kernel(const __grid_constant__ ReplayArguments a) {
  const GatedDeltaRuleInputs& in = a.p.in;
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int64_t head = quotient(blockIdx.x, a.slices), n = quotient(head, in.H), h = head - n * in.H;
  const int64_t v = (blockIdx.x - head * a.slices) * kReplayThreads + threadIdx.x;
  const ReplayColumn at{n, h, v, static_cast<float*>(a.p.final_state) + (n * in.H + h) * in.K * in.V + v};
  const StatePool& pool = a.prefill.pool;
  const int64_t row = on_pool ? row_of(pool, n) : n;
  if (row < 0) {  // a sequence without a row: zeros
    const Sequence sequence = sequence_of(a.plan, n);
    for (int64_t i = 0; v < in.V && i < sequence.length; ++i)
      static_cast<uint16_t*>(a.p.o)[((sequence.row * in.T + sequence.begin + i) * in.H + h) * in.V + v] = 0;
    return;
  }
  const bool mine = v < in.V && !isfinite(*at.state);
  if (__syncthreads_or(mine)) replay_columns<on_pool>(a, sequence_of(a.plan, n), at, mine);
  if constexpr (on_pool) put_columns(pool, at, row, in.K, in.V);
}

}  // namespace jet::hopper
