// C[64, 64] = A B^T + bias, with one mistake per variant that hardware forgives on a lucky day. test_planted_bugs.py
// names the Fault that each must raise; `none` must pass. A is written to shared memory by threads, B by TMA, the bias
// by a bulk copy.
#include "csrc/hopper/launch.h"
#include "csrc/hopper/tensor_map.h"
#include "csrc/hopper/tma.h"
#include "csrc/hopper/wgmma.h"
#include "tests/simulated/kernels/guarded.h"
#include "tests/simulated/kernels/operand_tile.h"

namespace jet::hopper::test {

enum class Bug : int {  // the order of test_planted_bugs.BUGS
  none,
  missing_proxy_fence,
  read_before_barrier,
  stage_overwritten,
  accumulator_before_wait,
  expect_too_small,
  expect_too_large,
  wrong_parity,
  out_of_bounds_shared,
  out_of_bounds_global,
  misaligned_bulk_copy,
  uninitialised_shared,
  exit_in_flight,
  divergent_barrier,
};

constexpr int kM = 64, kN = 64, kK = 64, kSteps = 4, kStages = 2;
using TileA = OperandTile<bf16, Swizzle::b128, Major::k, kM, kK>;
using TileB = OperandTile<bf16, Swizzle::b128, Major::k, kN, kK>;
using Mma = Wgmma<bf16, kN>;

struct Shared {
  struct Stage {
    alignas(kTileAlign) char a[TileA::bytes];
    alignas(kTileAlign) char b[TileB::bytes];
  };
  Stage stage[kStages];
  alignas(16) float bias[kN + 4];
  Mbarrier full[kStages], bias_loaded;
};

struct Arguments {
  const bf16* a;      // [kM, kSteps * kK]
  const float* bias;  // [kN + 4]
  float* c;           // [kM, kN]
};

__device__ void write_a(char* tile, const bf16* a, int step, int thread) {
  for (int at = thread * 8; at < kM * kK; at += kWarpgroup * 8) {
    const int row = at / kK, k = at % kK;
    *reinterpret_cast<uint4*>(tile + TileA::offset(row, k)) =
        *reinterpret_cast<const uint4*>(a + row * kSteps * kK + step * kK + k);
  }
}

template <Bug bug>
__device__ void load_b(Shared& shared, const CUtensorMap& map, int step) {
  const int stage = step % kStages;
  constexpr int wrong = bug == Bug::expect_too_small ? -16 : bug == Bug::expect_too_large ? 16 : 0;
  shared.full[stage].arrive_expect_tx(TileB::bytes + wrong);
  tma_load_tile<TileB>(shared.stage[stage].b, map, shared.full[stage], CacheHint::evict_normal, step * kK, 0);
}

template <Bug bug>
__device__ void multiply(Mma::Accumulator& c, Shared& shared, const CUtensorMap& map_b, const Arguments& p) {
  const int thread = threadIdx.x;
  for (int step = 0; step < kSteps; ++step) {
    auto& stage = shared.stage[step % kStages];
    if (bug != Bug::stage_overwritten) wgmma_wait_group<1>();  // the group that read this stage
    __syncthreads();
    if (thread == 0) load_b<bug>(shared, map_b, step);
    write_a(stage.a, p.a, step, thread);
    if (bug != Bug::missing_proxy_fence) fence_proxy_async();
    __syncthreads();
    const PhaseParity parity{bug == Bug::wrong_parity ? 0u : step / kStages % 2u};
    if (bug != Bug::read_before_barrier) shared.full[step % kStages].wait(parity);
    const MatrixDescriptor<TileA> a(stage.a);
    const MatrixDescriptor<TileB> b(stage.b);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kK; k += Mma::K)
      Mma::ss(c, a.at(0, k), b.at(0, k), step > 0 || k > 0);  // C += A Bᵀ   [64, 64], k16
    wgmma_commit_group();
  }
  if (bug != Bug::accumulator_before_wait) wgmma_wait_group<0>();
  wgmma_fence_operand(c);
}

template <Bug bug>
__global__ void __launch_bounds__(kWarpgroup) planted(const __grid_constant__ CUtensorMap map_b, const Arguments p) {
  extern __shared__ __align__(kTileAlign) char memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const int thread = threadIdx.x;
  if (thread == 0) {
    for (Mbarrier& full : shared.full) full.init(1);
    shared.bias_loaded.init(1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (bug == Bug::divergent_barrier && thread % 32 < 16) __syncthreads();
  if (thread == 0) {
    shared.bias_loaded.arrive_expect_tx(kN * 4);
    cp_async_bulk_load(shared.bias, p.bias + (bug == Bug::misaligned_bulk_copy ? 1 : 0), kN * 4, shared.bias_loaded);
  }
  Mma::Accumulator c;
  multiply<bug>(c, shared, map_b, p);
  if (bug == Bug::exit_in_flight && thread == 0) load_b<bug>(shared, map_b, 0);
  shared.bias_loaded.wait(PhaseParity::first());
  const int past = bug == Bug::uninitialised_shared ? 4 : 0;  // the last 4 of the array were never written
  if (bug == Bug::out_of_bounds_shared) shared.bias[thread + 4096] = 0;
  float* out = p.c + (bug == Bug::out_of_bounds_global ? kM * kN - 64 : 0);
#pragma unroll
  for (int r = 0; r < Mma::registers; ++r) {
    const int column = accumulator_column(thread, r);
    out[accumulator_row(thread, r) * kN + column] = c[r] + shared.bias[column + past];
  }
}

template <int... bugs>
void launch_bug(int bug, const CUtensorMap& map_b, const Arguments& p, std::integer_sequence<int, bugs...>) {
  void (*const kernels[])(CUtensorMap, Arguments) = {planted<static_cast<Bug>(bugs)>...};
  launch("planted", {dim3(1), kWarpgroup, sizeof(Shared)}, nullptr, kernels[bug], map_b, p);
}

}  // namespace jet::hopper::test

extern "C" int planted_bug(int bug, const void* a, const void* b, const float* bias, float* c, char* message) {
  using namespace jet::hopper::test;
  return guarded(message, [&] {
    constexpr int bugs = static_cast<int>(Bug::divergent_barrier) + 1;
    jet::hopper::require(bug >= 0 && bug < bugs, "planted", "bug", "one of the enumeration", bug);
    const CUtensorMap map_b =
        jet::hopper::make_operand_map<TileB>("B", b, jet::Dtype::bf16, kN, kSteps * kK, kSteps * kK);
    launch_bug(bug, map_b, {static_cast<const jet::bf16*>(a), bias, c}, std::make_integer_sequence<int, bugs>());
  });
}
