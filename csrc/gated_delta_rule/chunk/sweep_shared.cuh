// The configuration, arguments and shared memory of `sweep` (sweep.cuh), and which CTA does what.
#pragma once

#include "csrc/gated_delta_rule/chunk/plan.cuh"
#include "csrc/gated_delta_rule/head_dims.h"
#include "csrc/hopper/device.h"
#include "csrc/hopper/pipeline.h"
#include "csrc/hopper/tensor_map.h"
#include "csrc/hopper/tma.h"
#include "csrc/hopper/wgmma.h"

namespace jet::hopper {

constexpr int kRows = kValueTile;
constexpr int kGroups = 2;               // consumer warpgroups: S^T [128, K] fills the registers that a CTA has for it
constexpr int kSlice = kGroups * kRows;  // value columns of a CTA
constexpr int kNormalisers = 96;         // threads: the producer warpgroup but the warp that loads
constexpr int kStep = 16, kSteps = C / kStep;  // k16 steps over the tokens of a chunk

// v or o: [C tokens][64 columns], (column, token)
using ValueTile = OperandTile<uint16_t, Swizzle::b128, Major::mn, kRows, C>;
using SquareOperand = MatrixDescriptor<SquareTile>;
// S0 or dS of a chunk for the backward: [K rows][64 columns], (column, row). As it lies in shared memory it is kept.
template <int K>
using StateTile = OperandTile<uint16_t, Swizzle::b128, Major::mn, kRows, K>;

enum class SweepPass {
  outputs,
  cuts,    // over the segments before a cut, for their effect on the state alone
  states,  // for the backward: S0 and U' of every chunk
  pooled,  // outputs of a prefill: marks, and initial states in bf16 too. Apart, as the other one's schedule would
           // change
};

template <int K_, SweepPass pass>
struct SweepConfig {
  static constexpr int K = K_;
  static constexpr bool pooled = pass == SweepPass::pooled;
  static constexpr bool outputs = pass == SweepPass::outputs || pooled, cuts = pass == SweepPass::cuts,
                        states = pass == SweepPass::states;
  static constexpr bool reverse = false;
  using Operand = f16;
  static constexpr int stages = K <= 128 ? 3 : 2;  // what fits
  // k16 steps of S^T held as A operands: all, or what fits
  static constexpr int state_steps = K <= 128 ? K / 16 : K == 192 ? 4 : 2;
  // S^T Qn^T runs while R is made. For a larger K its operands have no registers then.
  static constexpr bool o_behind_residual = K <= 192;
  static constexpr int threads = kWarpgroup * (1 + kGroups);
  static constexpr bool few_registers = K > 128;  // S^T alone has K / 2 of a consumer's
  static constexpr int producer_registers = few_registers ? 24 : 40, consumer_registers = few_registers ? 240 : 232;
  static constexpr int normaliser_batch = few_registers ? 2 : 4;  // units of 16 bytes that a thread has in flight
  static_assert(producer_registers + kGroups * consumer_registers <= 504, "what 384 threads get at launch: 168 each");
  static constexpr Swizzle swizzle = K % 64 == 0 ? Swizzle::b128 : Swizzle::b64;  // 96 is three panels of 32 elements
  using Rows = OperandTile<f16, swizzle, Major::k, C, K>;                         // k or q: [C tokens][K] in panels
  using RowsOperand = MatrixDescriptor<Rows>;
  // the same bytes as the B operand [K, C]
  using ColumnsOperand = MatrixDescriptor<OperandTile<f16, swizzle, Major::mn, K, C>>;
  static_assert(RowsOperand::Tile::bytes == ColumnsOperand::Tile::bytes &&
                RowsOperand::Tile::offset(5, 40) == ColumnsOperand::Tile::offset(40, 5));
  using Mma = Wgmma<f16, C>;
  using MmaState = Wgmma<f16, K, Major::k, Major::mn>;
  using Tokens = typename Mma::Accumulator;      // [64 value columns, C]
  using State = typename MmaState::Accumulator;  // S^T [64, K]
  using StateImage = StateTile<K>;
};

template <class Config>
struct SweepStage {
  alignas(kTileAlign) char k[Config::Rows::bytes];
  char q[Config::outputs ? Config::Rows::bytes : kTileAlign];
  alignas(kTileAlign) char v[kGroups][ValueTile::bytes];
  alignas(kTileAlign) char t[SquareTile::bytes];
  alignas(kTileAlign) char p[Config::outputs ? SquareTile::bytes : kTileAlign];
  alignas(128) float vectors[kVectors][C];
};

struct SweepArguments {
  ChunkPlan plan;
  Dtype dtype;
  int64_t H, Hk, K, V;
  int slices;  // of a value head: ceil(V / kSlice)
  float scale;
  bool l2norm;
  const char* images;  // [chunks, H] of image_bytes, from prepare
  int image_bytes;
  const float* initial_state;  // null: zeros
  StateStrides initial_state_strides;
  PrefillStates prefill{};                // with a pool: its rows are the initial states
  float* final_state;                     // [N, H, K, V]
  float *states, *transfers;              // [cuts, H, K, V], [cuts, H, K, K]: workspace.h
  float* transposed_transfers = nullptr;  // for the backward
  uint16_t* o;                            // [B, T, H, V]
  // For the backward, in the dtype of q: tiles of 64 value columns, [chunks, H, value_tiles(V)] of StateTile, ValueTile
  char *chunk_states = nullptr, *chunk_updates = nullptr;
  bool cuts = false;  // of reverse: over the segments behind a cut, for the gradients of the states there alone
};

// q, k: (K, Hk, T, B), v, o: (V, H, T, B)
struct SweepMaps {
  CUtensorMap q, k, v, o;
};

enum class InitialState { zeros, memory, identity };

// What a CTA has to do: some chunks, for some columns of the state S [K, values].
struct SweepWork {
  int64_t row, token, length, first_chunk;  // token: the first; length: to the end of the sequence
  int chunks, h, hk;
  int values, column, groups;  // column: of the slice; groups: warpgroups that have value columns, 0: nothing to do
  InitialState initial;
  bool is_bf16;               // initial_state, else it is fp32
  const void* initial_state;  // strides k, v
  StateStrides strides;
  float* final_state;  // [K, values] or null
  float* transposed;   // of a transfer matrix, [values, K] or null
  __device__ int count(int chunk) const { return static_cast<int>(min(length - int64_t{chunk} * C, int64_t{C})); }
  // The transfer matrix of a segment is what it makes of the identity, with V = 0.
  __device__ bool is_transfer() const { return initial == InitialState::identity; }
};

// Segment s of sequence n. `from_call`: it starts from the state that the call was given.
__device__ inline SweepWork segment_work(const SweepArguments& p, const Sequence& sequence, int64_t n, int s,
                                         bool from_call, int h, int values, int column) {
  int begin = 0, end = sequence.chunks;
  if (sequence.segments > 1)
    begin = segment_begin(sequence.chunks, sequence.segments, s),
    end = segment_begin(sequence.chunks, sequence.segments, s + 1);
  SweepWork work{};
  work.row = sequence.row, work.token = sequence.begin + int64_t{begin} * C,
  work.length = sequence.length - int64_t{begin} * C;
  work.first_chunk = sequence.first_chunk + begin, work.chunks = end - begin;
  work.h = h, work.hk = h / static_cast<int>(quotient(p.H, p.Hk));
  work.values = values, work.column = column, work.groups = values - column > kRows ? 2 : 1;
  if (!from_call) return work;
  if (const StatePool& pool = p.prefill.pool; pool.data != nullptr) {
    const int64_t row = initial_row(p.prefill, n);
    if (row < 0) return work;
    work.initial = InitialState::memory, work.strides = pool.strides, work.is_bf16 = pool.dtype == Dtype::bf16;
    work.initial_state =
        static_cast<const char*>(pool.data) + (row * pool.strides.n + h * pool.strides.h) * (work.is_bf16 ? 2 : 4);
    return work;
  }
  if (p.initial_state == nullptr) return work;
  work.initial = InitialState::memory, work.strides = p.initial_state_strides;
  work.initial_state = p.initial_state + n * p.initial_state_strides.n + h * p.initial_state_strides.h;
  return work;
}

// Which part of the work a CTA is: CTAs (part, head, slice). launch_sweep_kernel has checked that there are fewer than
// 2^31.
struct SweepPart {
  int part, h, slice;
};
__device__ inline SweepPart part_of_cta(const SweepArguments& p, int slices) {
  const int cta = static_cast<int>(blockIdx.x), H = static_cast<int>(p.H), head = cta / slices, part = head / H;
  return {part, head - part * H, cta - head * slices};
}

// Outputs: CTAs (segment, head, slice of V).
__device__ inline SweepWork output_work(const SweepArguments& p) {
  const auto [segment, h, slice] = part_of_cta(p, p.slices);
  const int64_t n = sequence_of_segment(p.plan, segment);
  if (n < 0) return {};
  const Sequence sequence = sequence_of(p.plan, n);
  const int s = static_cast<int>(segment - n - sequence.first_cut);
  SweepWork work = segment_work(p, sequence, n, s, s == 0, h, static_cast<int>(p.V), slice * kSlice);
  if (s > 0) {
    work.initial = InitialState::memory, work.strides = {0, 0, p.V, 1};
    work.initial_state = p.states + ((sequence.first_cut + s - 1) * p.H + h) * p.K * p.V;
  }
  if (s == sequence.segments - 1 && p.final_state != nullptr)
    work.final_state = p.final_state + (n * p.H + h) * p.K * p.V;
  return work;
}

JET_HOST_DEVICE constexpr int transfer_slices(int64_t K) { return static_cast<int>((K + kSlice - 1) / kSlice); }

// No outputs: CTAs (segment before a cut, head, slice of V, then of the K columns of its transfer matrix).
__device__ inline SweepWork cut_work(const SweepArguments& p) {
  const auto [cut, h, slice] = part_of_cta(p, p.slices + transfer_slices(p.K));
  const int64_t n = sequence_of_cut(p.plan, cut);
  if (n < 0) return {};
  const Sequence sequence = sequence_of(p.plan, n);
  const int s = cut - sequence.first_cut;
  const bool transfer = slice >= p.slices;
  if (transfer && s == 0) return {};  // the first segment starts from the true state
  const int64_t values = transfer ? p.K : p.V;
  SweepWork work = segment_work(p, sequence, n, s, s == 0, h, static_cast<int>(values),
                                (transfer ? slice - p.slices : slice) * kSlice);
  work.final_state = (transfer ? p.transfers : p.states) + (cut * p.H + h) * p.K * values;
  if (!transfer) return work;
  work.initial = InitialState::identity;
  if (p.transposed_transfers != nullptr) work.transposed = p.transposed_transfers + (cut * p.H + h) * p.K * p.K;
  return work;
}

template <class Config>
struct SweepShared {
  SweepStage<Config> stage[Config::stages];
  alignas(kTileAlign) char o[kGroups][ValueTile::bytes];
  alignas(kTileAlign) char state[kGroups][Config::states ? Config::StateImage::bytes : 16];
  Ring<Config::stages> ring;                      // full: the copies have arrived
  Mbarrier normalised[Config::stages];            // k and q are Kn and Qn
  int mark[Config::pooled ? Config::stages : 1];  // ChunkPlan::marks of the chunk
  SweepWork work;

  // Of a transfer matrix's values nothing is ever loaded.
  __device__ void zero_values() {
    for (SweepStage<Config>& s : stage)
      for (int i = threadIdx.x * 16; i < kGroups * ValueTile::bytes; i += Config::threads * 16)
        *reinterpret_cast<uint4*>(s.v[0] + i) = make_uint4(0, 0, 0, 0);
  }

  // Above the diagonal of T' and P' nothing is ever loaded.
  __device__ void zero_upper_blocks(int thread, int threads) {
#pragma unroll 1
    for (int s = 0; s < Config::stages; ++s)
      for (int panel = 1; panel < kBlocks; ++panel) {
        const int at = panel * SquareTile::panel_bytes, bytes = panel_in_tile(panel) - at;
#pragma unroll 1
        for (int i = thread * 16; i < bytes; i += threads * 16) {
          *reinterpret_cast<uint4*>(stage[s].t + at + i) = make_uint4(0, 0, 0, 0);
          if constexpr (Config::outputs) *reinterpret_cast<uint4*>(stage[s].p + at + i) = make_uint4(0, 0, 0, 0);
        }
      }
  }
};

// Of a chunk's turn in the ring; computed, because the consumers have no register to keep it in.
template <class Config>
__device__ PhaseParity parity_of(int chunk) {
  return {static_cast<uint32_t>(chunk / Config::stages % 2)};
}

// In two files, which compile at the same time: sweep_narrow.cu has the kernels for K up to this, sweep_wide.cu those
// for the others.
constexpr int kMostNarrowK = 128;
template <bool narrow>
void launch_sweep_part(const SweepArguments& p, const SweepMaps& maps, bool outputs, cudaStream_t stream);

}  // namespace jet::hopper
