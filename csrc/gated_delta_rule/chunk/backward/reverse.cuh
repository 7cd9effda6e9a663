// `reverse`: dS, the gradient of the state, through the chunks of a sequence from the last to the first, and dV. In the
// names of flash-linear-attention: chunk_bwd_dhu and chunk_bwd_dv in one.
//
// CTAs and warps are those of sweep (sweep.cuh): dO comes in V's place, dV leaves in O's, and the state is dS^T
// [64, K] in fp32 accumulators. Per chunk, with the gradients on the left as A operands from registers, in the dtype of
// q:
//   B  = beta_j e^{c_C - c_j} dS^T K^T + dO^T P''        [64, C], beta ∘ dU transposed
//   dV = B + B (T' - I)
//   dS = e^{c_C} dS + dO^T Q'' - (e^{c_j} dV) K
// with Q'' = scale e^{c_i} times rows of Q, P'' = diag(scale |q_i|) P'. Rows of K are as in memory, so exact, and what
// makes them K is a factor of columns. P'' and T' are MN-major here, from the tiles that sweep has K-major. T' is fp16
// as there, and B meets it in fp16, each of its rows at a scale of its own: where keys resemble each other dV is what
// large terms leave, and bf16 would leave 8 times the error. B, whose product with I is exact, stays in fp32.
#pragma once

#include "csrc/gated_delta_rule/chunk/backward/finite_operand.cuh"
#include "csrc/gated_delta_rule/chunk/sweep.cuh"

namespace jet::hopper {

template <int K_, class Element>
struct ReverseConfig {
  static constexpr int K = K_;
  using Operand = Element;
  static constexpr bool outputs = true, cuts = false, states = true, pooled = false, reverse = true;
  static constexpr int stages = K <= 96 ? 3 : 2;  // what fits
  // As in sweep, k16 steps of dS^T held as A operands.
  static constexpr int state_steps = K <= 128 ? K / 16 : K == 192 ? 4 : 2;
  static constexpr int threads = kWarpgroup * (1 + kGroups);
  static constexpr bool few_registers = K > 128;
  static constexpr int producer_registers = few_registers ? 24 : 40, consumer_registers = few_registers ? 240 : 232;
  static constexpr int normaliser_batch = few_registers ? 2 : 4;
  static constexpr Swizzle swizzle = K % 64 == 0 ? Swizzle::b128 : Swizzle::b64;
  using Rows = OperandTile<Element, swizzle, Major::k, C, K>;
  using RowsOperand = MatrixDescriptor<Rows>;
  using ColumnsOperand = MatrixDescriptor<OperandTile<Element, swizzle, Major::mn, K, C>>;
  template <class Square>
  using SquareColumns = MatrixDescriptor<OperandTile<Square, Swizzle::b32, Major::mn, C, C>>;
  static_assert(SquareColumns<f16>::Tile::offset(5, 40) == SquareTile::offset(40, 5));
  using Mma = Wgmma<Element, C>;
  using MmaSquare = Wgmma<Element, C, Major::k, Major::mn>;
  using MmaInverse = Wgmma<f16, C, Major::k, Major::mn>;
  using MmaState = Wgmma<Element, K, Major::k, Major::mn>;
  using Tokens = typename Mma::Accumulator;
  using State = typename MmaState::Accumulator;
  // Rows of dS in shared memory at a time on their way out: all, or what fits.
  static constexpr int image_rows = K <= 128 ? K : K == 192 ? 64 : 32;
  using StateImage = StateTile<image_rows>;
  static_assert(StateTile<K>::panels == 1, "rows follow each other, so that the parts of an image do");
};

// Outputs: CTAs (segment, head, slice of V). `initial_state` of the arguments is the final state's gradient,
// `final_state` the initial state's, `states` are gradients of the states at cuts.
__device__ inline SweepWork reverse_output_work(const SweepArguments& p) {
  const auto [segment, h, slice] = part_of_cta(p, p.slices);
  const int64_t n = sequence_of_segment(p.plan, segment);
  if (n < 0) return {};
  const Sequence sequence = sequence_of(p.plan, n);
  const int s = static_cast<int>(segment - n - sequence.first_cut), last = sequence.segments - 1;
  SweepWork work = segment_work(p, sequence, n, s, s == last, h, static_cast<int>(p.V), slice * kSlice);
  if (s < last) {
    work.initial = InitialState::memory, work.strides = {0, 0, p.V, 1};
    work.initial_state = p.states + ((sequence.first_cut + s) * p.H + h) * p.K * p.V;
  }
  if (s == 0) work.final_state = p.final_state + (n * p.H + h) * p.K * p.V;
  return work;
}

// No outputs: CTAs (segment behind a cut, head, slice of V).
__device__ inline SweepWork reverse_cut_work(const SweepArguments& p) {
  const auto [cut, h, slice] = part_of_cta(p, p.slices);
  const int64_t n = sequence_of_cut(p.plan, cut);
  if (n < 0) return {};
  const Sequence sequence = sequence_of(p.plan, n);
  const int s = cut - sequence.first_cut + 1;
  SweepWork work =
      segment_work(p, sequence, n, s, s == sequence.segments - 1, h, static_cast<int>(p.V), slice * kSlice);
  work.final_state = p.states + (int64_t{cut} * p.H + h) * p.K * p.V;
  return work;
}

// dS behind a chunk to global memory, a few rows at a time where shared memory has no room for more.
template <class Config>
__device__ void store_state_gradient(const typename Config::State& s, const SweepArguments& p, const SweepWork& work,
                                     SweepShared<Config>& shared, const SweepThread& me, int chunk) {
  using Tile = typename Config::StateImage;
  constexpr int steps = Config::image_rows / kStep;
  const int column = ldmatrix_trans_m(me.thread), row = ldmatrix_trans_k(me.thread);
  char* const tile = shared.state[me.group];
  const int64_t at = ((work.first_chunk + chunk) * p.H + work.h) * value_tiles(p.V) + me.column / kRows;
#pragma unroll
  for (int part = 0; part < Config::K / Config::image_rows; ++part) {
    if (me.thread == 0) cp_async_bulk_wait_group_read<0>();
    named_barrier_sync(1 + me.group, kWarpgroup);
#pragma unroll
    for (int step = 0; step < steps; ++step) {
      uint32_t words[4];
      accumulator_to_a_fragment<typename Config::Operand>(words, s, part * steps + step);
      stmatrix_x4_trans(tile + Tile::offset(column, step * kStep + row), words);
    }
    fence_proxy_async();
    named_barrier_sync(1 + me.group, kWarpgroup);
    if (me.thread == 0) {
      cp_async_bulk_store(p.chunk_states + at * StateTile<Config::K>::bytes + part * Tile::bytes, tile, Tile::bytes);
      cp_async_bulk_commit_group();
    }
  }
}

// dO^T as an A operand.
template <class Config>
__device__ void load_gradient(uint32_t (&g)[kSteps][4], const SweepStage<Config>& stage, const SweepThread& me) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    ldmatrix_x4_trans(g[step], stage.v[me.group] + ValueTile::offset(ldmatrix_trans_m(me.thread),
                                                                     step * kStep + ldmatrix_trans_k(me.thread)));
}

// Factors of columns, of products with rows of K as they are in memory.
template <class Config>
__device__ float2 key_columns(const SweepStage<Config>& stage, Vector vector, int thread, int r) {
  const float2 factor = columns_of(stage.vectors[vector], thread, r),
               inverse = columns_of(stage.vectors[kInverseK], thread, r);
  return make_float2(factor.x * inverse.x, factor.y * inverse.y);
}

// Powers of two for the two rows that a thread has of B, which bring the largest number of each to [2^14, 2^15): fp16
// then has 11 bits of all that is above 2^-28 of it.
template <class Config>
__device__ void row_scales(float (&scale)[2], float (&inverse)[2], const typename Config::Tokens& b) {
  constexpr int chains = 8, registers = Config::Mma::registers;  // four a row: one alone would wait for itself
  float most[chains] = {};
#pragma unroll
  for (int at = 0; at < registers; ++at) most[at % chains] = fmaxf(most[at % chains], fabsf(b[at]));
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const float *pair = most + 2 * e, *other = pair + 4;
    float largest = fmaxf(fmaxf(pair[0], pair[1]), fmaxf(other[0], other[1]));
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2)
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    constexpr uint32_t bias = 127, up = 14, most_field = 2 * bias - 1;  // exponents; the inverse of the last is normal
    const uint32_t wanted = 2 * bias + up - (__float_as_uint(largest) >> 23);
    const uint32_t field = wanted < most_field ? wanted : most_field;
    scale[e] = __uint_as_float(field << 23), inverse[e] = __uint_as_float((2 * bias - field) << 23);
  }
}

// dV^T = B + B (T' - I)   [64, C]
template <class Config>
__device__ void multiply_inverse(typename Config::Tokens& b, const SweepStage<Config>& stage) {
  using Mma = typename Config::MmaInverse;
  const typename Config::template SquareColumns<f16> t(stage.t);
  float scale[2], inverse[2];
  row_scales<Config>(scale, inverse, b);
#pragma unroll
  for (int at = 0; at < Mma::registers; ++at) b[at] *= scale[at / 2 % 2];
  uint32_t y[kSteps][4];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) accumulator_to_a_fragment<f16>(y[step], b, step);
  wgmma_fence(b, y);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) Mma::rs(b, y[step], t.at(0, step * Mma::K), true);
  wgmma_commit_group();
  wgmma_wait_group<0>();
  wgmma_fence_operand(b);
  wgmma_hold_operand(y);
#pragma unroll
  for (int at = 0; at < Mma::registers; ++at) b[at] *= inverse[at / 2 % 2];
}

// dV for memory and -e^{c_j} dV, over |k_j| with l2norm, for dS, as A operands.
template <class Config>
__device__ void value_gradients(uint32_t (&dv)[kSteps][4], uint32_t (&to_state)[kSteps][4],
                                const typename Config::Tokens& x, const SweepStage<Config>& stage, int thread) {
  using Element = typename Config::Operand;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    accumulator_to_a_fragment<Element>(dv[step], x, step);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 2 * kStep / 4 * step + 2 * i;
      const float2 read = key_columns<Config>(stage, kReadK, thread, at);
      to_state[step][i] =
          pack<Element>(finite_operand<Element>(-read.x * x[at]), finite_operand<Element>(-read.y * x[at + 1]));
    }
  }
}

template <class Config>
__device__ void reverse_chunk(typename Config::State& s, const SweepArguments& p, const SweepMaps& maps,
                              const SweepWork& work, SweepShared<Config>& shared, const SweepStage<Config>& stage,
                              const SweepThread& me, int chunk) {
  using MmaSquare = typename Config::MmaSquare;
  using MmaState = typename Config::MmaState;
  const typename Config::template SquareColumns<typename Config::Operand> pp(stage.p);
  const typename Config::ColumnsOperand k(stage.k), q(stage.q);
  const bool outputs = !p.cuts;
  typename Config::Tokens b;
  uint32_t a[Config::state_steps][4], g[kSteps][4];
  const StateProduct<Config> sk{b, typename Config::RowsOperand(stage.k)};
  const auto add_queries = [&] {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      MmaState::rs(s, g[step], q.at(0, step * MmaState::K), true);  // dSᵀ += dOᵀ Q''   [64, K]
    wgmma_commit_group();
  };
  if (outputs) store_state_gradient<Config>(s, p, work, shared, me, chunk);
  if constexpr (Config::few_registers) {  // one thing after the other
    multiply_state<Config>(a, s, sk);     // dSᵀ Kᵀ   [64, C]
    wgmma_wait_group<0>();
    wgmma_fence_operand(b), wgmma_hold_operand(a);
    load_gradient<Config>(g, stage, me);
    decay_state<Config>(s, stage);
  } else {
    load_gradient<Config>(g, stage, me);
#pragma unroll
    for (int step = 0; step < Config::state_steps; ++step)
      accumulator_to_a_fragment<typename Config::Operand>(a[step], s, step);
    decay_state<Config>(s, stage);  // while products are under way ptxas would have it wait for them
    wgmma_fence(a, s, g);
    multiply_fragments(sk, a, 0);
    add_queries();
    wgmma_wait_group<1>();
    wgmma_fence_operand(b), wgmma_hold_operand(a);
  }
#pragma unroll
  for (int at = 0; at < MmaSquare::registers; at += 2) {
    const float2 write = key_columns<Config>(stage, kWrite, me.thread, at);
    b[at] *= write.x, b[at + 1] *= write.y;
  }
  if constexpr (Config::few_registers)
    wgmma_fence(b, s, g);
  else
    wgmma_fence(b);
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    MmaSquare::rs(b, g[step], pp.at(0, step * MmaSquare::K), true);  // B += dOᵀ P''   [64, C]
  wgmma_commit_group();
  if constexpr (Config::few_registers) {
    add_queries();
    wgmma_wait_group<1>();
  } else {
    wgmma_wait_group<0>();
  }
  wgmma_fence_operand(b);
  multiply_inverse<Config>(b, stage);
  wgmma_fence_operand(s);
  wgmma_hold_operand(g);
  uint32_t y[kSteps][4], to_state[kSteps][4];
  value_gradients<Config>(y, to_state, b, stage, me.thread);
  wgmma_fence(s, to_state);
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    MmaState::rs(s, to_state[step], k.at(0, step * MmaState::K), true);  // dSᵀ -= (..dV)ᵀ K   [64, K]
  wgmma_commit_group();
  if (outputs) {
    if (chunk == work.chunks - 1)
      store_last_output<Config>(y, p, maps, work, shared, me);
    else
      store_output<Config>(y, maps, work, shared, me, chunk);
  }
  wgmma_wait_group<0>();
  wgmma_fence_operand(s);
  wgmma_hold_operand(to_state);
}

template <class Config>
__device__ void reverse_chunks(const SweepArguments& p, const SweepMaps& maps, const SweepWork& work,
                               SweepShared<Config>& shared) {
  const int group = threadIdx.x / kWarpgroup - 1;
  if (group >= work.groups) return;
  const SweepThread me{group, static_cast<int>(threadIdx.x % kWarpgroup), work.column + group * kRows};
  typename Config::State s;
  load_state<Config>(s, work, me);
#pragma unroll 1
  for (int turn = 0; turn < work.chunks; ++turn) {
    const int stage = turn % Config::stages;
    const PhaseParity parity = parity_of<Config>(turn);
    shared.ring.full[stage].wait(parity);
    shared.normalised[stage].wait(parity);
    reverse_chunk<Config>(s, p, maps, work, shared, shared.stage[stage], me, work.chunks - 1 - turn);
    __syncwarp();
    if (me.thread % 32 == 0) shared.ring.empty[turn % Config::stages].arrive();
  }
  store_state<Config>(s, work, me);
  if (me.thread == 0) cp_async_bulk_wait_group<0>();
}

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1)
    chunk_reverse_kernel(const __grid_constant__ SweepArguments p, const __grid_constant__ SweepMaps maps) {
  extern __shared__ __align__(kTileAlign) char memory[];
  auto& shared = *reinterpret_cast<SweepShared<Config>*>(memory);
  const SweepWork& work = shared.work;
  if (threadIdx.x == 0)
    set_up<Config>(p, maps, shared, [&] { return p.cuts ? reverse_cut_work(p) : reverse_output_work(p); });
  else if (threadIdx.x >= 32)
    shared.zero_upper_blocks(threadIdx.x - 32, Config::threads - 32);
  fence_proxy_async();
  griddepcontrol_wait();
  __syncthreads();
  griddepcontrol_launch_dependents();
  if (work.groups == 0) return;
  if (warp_index() < kWarpgroup / 32) {
    setmaxnreg_dec<Config::producer_registers>();
    if (warp_index() > 0)
      normalise_chunks<Config>(p, work, shared);
    else if (elect_one())
      load_chunks<Config>(p, maps, work, shared);
  } else {
    setmaxnreg_inc<Config::consumer_registers>();
    reverse_chunks<Config>(p, maps, work, shared);
  }
}

template <class Config>
void launch_reverse_kernel(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream) {
  static_assert(sizeof(SweepShared<Config>) <= kMaxSharedMemoryPerBlock);
  const int64_t segments = p.plan.most_cuts + (p.cuts ? 0 : p.plan.N);
  const int64_t ctas = segments * p.H * p.slices;
  require(ctas < (int64_t{1} << 31), kChunkBackwardOp, "N * H * V / 128", "below 2^31", ctas);
  launch(kChunkBackwardOp,
         {.grid = dim3(static_cast<unsigned>(ctas)),
          .threads = Config::threads,
          .shared_bytes = static_cast<int>(sizeof(SweepShared<Config>)),
          .programmatic = true},
         stream, chunk_reverse_kernel<Config>, p, maps);
}

}  // namespace jet::hopper
