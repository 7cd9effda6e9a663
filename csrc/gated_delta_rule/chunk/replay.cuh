// `replay`: the value columns whose final state is not finite once more, token by token in fp32 from the initial state.
//
// In a chunk a NaN reaches tokens before its own, as zeros above the diagonals are multiplied by it. Once in the state
// it stays, 0 NaN being NaN, and U_j k_j^T spreads it over all rows of its columns: a look at one row of the final
// state finds it. Infinities and numbers that fp16 does not hold are found alike. A CTA has a sequence, a value head
// and 128 columns, one for each thread, whose state is kept in final_state.
#pragma once

#include "csrc/gated_delta_rule/chunk/plan.cuh"
#include "csrc/gated_delta_rule/head_dims.h"
#include "csrc/hopper/launch.h"

namespace jet::hopper {

struct ReplayArguments {
  ChunkPlan plan;
  ChunkGatedDeltaRuleParams p;
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

static __global__ void __launch_bounds__(kReplayThreads)
    chunk_replay_kernel(const __grid_constant__ ReplayArguments a) {
  __shared__ float q[HopperHeadDims::most], k[HopperHeadDims::most];
  const ChunkGatedDeltaRuleParams& p = a.p;
  const GatedDeltaRuleInputs& in = p.in;
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int64_t head = quotient(blockIdx.x, a.slices), n = quotient(head, in.H), h = head - n * in.H,
                hk = quotient(h, quotient(in.H, in.Hk));
  const int64_t v = (blockIdx.x - head * a.slices) * kReplayThreads + threadIdx.x;
  float* const state = static_cast<float*>(p.final_state) + (n * in.H + h) * in.K * in.V + v;
  const bool mine = v < in.V && !isfinite(*state);
  if (!__syncthreads_or(mine)) return;
  const Sequence sequence = sequence_of(a.plan, n);
  const StateStrides& from = p.initial_state.strides;
  const float* initial = static_cast<const float*>(p.initial_state.data) + n * from.n + h * from.h + v * from.v;
  if (mine)
    for_each_row(state, in.K, in.V,
                 [&](float, int i) { return p.initial_state.data == nullptr ? 0.f : initial[i * from.k]; });
  const auto at = [&](const TokenStrides& s, int64_t token, int64_t head) {
    return sequence.row * s.b + token * s.t + head * s.h;
  };
#pragma unroll 1
  for (int64_t token = sequence.begin; token < sequence.begin + sequence.length; ++token) {
    __syncthreads();
    if (threadIdx.x / 32 == 0) load_token_row(q, in, in.q, at(in.q.strides, token, hk));
    if (threadIdx.x / 32 == 1) load_token_row(k, in, in.k, at(in.k.strides, token, hk));
    __syncthreads();
    if (!mine) continue;
    const float decay = expf(static_cast<const float*>(in.g.data)[at(in.g.strides, token, h)]);
    const float beta = static_cast<const float*>(in.beta.data)[at(in.beta.strides, token, h)];
    float predicted = 0, read = 0;
    for_each_row(state, in.K, in.V,
                 [&](float s, int i) { return predicted = fmaf(decay * s, k[i], predicted), decay * s; });
    const float u =
        beta * (load_as_float(in.v.data, in.v.dtype, at(in.v.strides, token, h) + v * in.v.strides.d) - predicted);
    for_each_row(state, in.K, in.V, [&](float s, int i) {
      s = fmaf(k[i], u, s);
      return read = fmaf(s, q[i], read), s;
    });
    const float o = read * static_cast<float>(in.scale);
    static_cast<uint16_t*>(p.o)[((sequence.row * in.T + token) * in.H + h) * in.V + v] =
        static_cast<uint16_t>(in.v.dtype == Dtype::bf16 ? pack<bf16>(o, 0) : pack<f16>(o, 0));
  }
}

}  // namespace jet::hopper
