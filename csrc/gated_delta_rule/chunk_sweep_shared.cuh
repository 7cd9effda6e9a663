// The configuration, arguments and shared memory of `sweep` (chunk_sweep.cuh).
#pragma once

#include "csrc/gated_delta_rule/chunk_plan.cuh"
#include "csrc/hopper/cluster.h"
#include "csrc/hopper/pipeline.h"
#include "csrc/hopper/tensor_map.h"
#include "csrc/hopper/wgmma.h"

namespace jet::hopper {

constexpr int kRows = 64;                    // value columns of a warpgroup: the rows of its wgmma
constexpr int kGroups = 2;                   // consumer warpgroups: S^T [128, K] fills the registers that a CTA has for it
constexpr int kSlice = kGroups * kRows;      // value columns of a CTA
constexpr int kNormalisers = 96;             // threads: the producer warpgroup but the warp that loads
constexpr int kStep = 16, kSteps = C / kStep;  // k16 steps over the tokens of a chunk

using ValueTile = OperandTile<uint16_t, Swizzle::b128, Major::mn, kRows, C>;  // v or o: [C tokens][64 columns], (column, token)
using SquareOperand = Operand<f16, SquareTile::swizzle, Major::k, C, C>;

template <int K_>
struct SweepConfig {
  static constexpr int K = K_;
  static constexpr int stages = K <= 128 ? 3 : 2;             // what fits
  static constexpr int state_steps = K <= 128 ? K / 16 : K == 192 ? 4 : 2;  // k16 steps of S^T held as A operands: all, or what fits
  static constexpr int threads = kWarpgroup * (1 + kGroups);
  static constexpr bool few_registers = K > 128;  // S^T alone has K / 2 of a consumer's
  static constexpr int producer_registers = few_registers ? 24 : 40, consumer_registers = few_registers ? 240 : 232;
  static constexpr int producer_unroll = few_registers ? 1 : 2;
  static_assert(producer_registers + kGroups * consumer_registers <= 504, "what 384 threads get at launch: 168 each");
  static constexpr Swizzle swizzle = K % 64 == 0 ? Swizzle::b128 : Swizzle::b64;  // 96 is three panels of 32 elements
  using Rows = OperandTile<f16, swizzle, Major::k, C, K>;     // k or q: [C tokens][K] in panels
  using RowsOperand = Operand<f16, swizzle, Major::k, C, K>;
  using ColumnsOperand = Operand<f16, swizzle, Major::mn, K, C>;  // the same bytes as the B operand [K, C]
  static_assert(RowsOperand::Tile::bytes == ColumnsOperand::Tile::bytes && RowsOperand::Tile::offset(5, 40) == ColumnsOperand::Tile::offset(40, 5));
  using Mma = Wgmma<f16, C>;
  using MmaState = Wgmma<f16, K, Major::k, Major::mn>;
  using Tokens = typename Mma::Accumulator;      // [64 value columns, C]
  using State = typename MmaState::Accumulator;  // S^T [64, K]
};

template <class Config>
struct SweepStage {
  alignas(kTileAlign) char k[Config::Rows::bytes];
  char q[Config::Rows::bytes];
  alignas(kTileAlign) char v[kGroups][ValueTile::bytes];
  alignas(kTileAlign) char t[SquareTile::bytes];
  alignas(kTileAlign) char p[SquareTile::bytes];
  alignas(128) float vectors[kVectors][C];
};

struct SweepArguments {
  ChunkPlan plan;
  Dtype dtype;
  int64_t H, Hk, V;
  int slices;  // of a value head: ceil(V / kSlice)
  const char* images;  // [chunks, H] of kImageBytes, from prepare
  const float* initial_state;  // null: zeros
  StateStrides initial_state_strides;
  float* final_state;  // [N, H, K, V]
  uint16_t* o;         // [B, T, H, V]
};

// q, k: (K, Hk, T, B), v, o: (V, H, T, B)
struct SweepMaps {
  CUtensorMap q, k, v, o;
};

// What a CTA has to do.
struct SweepWork {
  int64_t n, row, token, length, first_chunk;  // token: the first of `length`
  int chunks, h, hk, column, groups;           // column: of the slice; groups: warpgroups that have value columns
  __device__ int count(int chunk) const { return static_cast<int>(min(length - int64_t{chunk} * C, int64_t{C})); }
};

__device__ inline SweepWork sweep_work(const SweepArguments& p) {
  const int64_t head = blockIdx.x / p.slices, n = head / p.H;
  const int column = static_cast<int>(blockIdx.x % p.slices) * kSlice, h = static_cast<int>(head % p.H);
  const Sequence sequence = sequence_of(p.plan, n);
  return {n, sequence.row, sequence.begin, sequence.length, sequence.first_chunk, sequence.chunks, h, h / static_cast<int>(p.H / p.Hk), column,
          p.V - column > kRows ? 2 : 1};
}

template <class Config>
struct SweepShared {
  SweepStage<Config> stage[Config::stages];
  alignas(kTileAlign) char o[kGroups][ValueTile::bytes];
  Ring<Config::stages> ring;          // filled: the copies have arrived
  Event normalised[Config::stages];   // k and q are Kn and Qn
  SweepWork work;

  // Above the diagonal of T' and P nothing is ever loaded.
  __device__ void zero_upper_blocks() {
    for (int s = 0; s < Config::stages; ++s)
      for (int panel = 1; panel < kBlocks; ++panel) {
        const int at = panel * SquareTile::panel_bytes, bytes = panel_in_tile(panel) - at;
        for (int i = threadIdx.x * 16; i < bytes; i += Config::threads * 16) {
          *reinterpret_cast<uint4*>(stage[s].t + at + i) = make_uint4(0, 0, 0, 0);
          *reinterpret_cast<uint4*>(stage[s].p + at + i) = make_uint4(0, 0, 0, 0);
        }
      }
  }
};
static_assert(sizeof(SweepShared<SweepConfig<64>>) <= 227 * 1024 && sizeof(SweepShared<SweepConfig<96>>) <= 227 * 1024);
static_assert(sizeof(SweepShared<SweepConfig<128>>) <= 227 * 1024 && sizeof(SweepShared<SweepConfig<192>>) <= 227 * 1024);
static_assert(sizeof(SweepShared<SweepConfig<256>>) <= 227 * 1024);

// Of a chunk's turn in the ring; computed, because the consumers have no register to keep it in.
template <class Config>
__device__ Parity parity_of(int chunk) {
  return {static_cast<uint32_t>(chunk / Config::stages % 2)};
}

// One translation unit per K instantiates it: chunk_sweep_k*.cu.
template <class Config>
void launch_sweep(const SweepArguments& p, const SweepMaps& maps, cudaStream_t stream);

// Registers of an A operand that wgmma may read until the wait before this line.
template <int n>
__device__ void hold(const uint32_t (&a)[n][4]) {
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" ::"r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]) : "memory");
}

}  // namespace jet::hopper
