// The stages of the chunked gated delta rule one by one, for tests: one sequence, K = 64, bf16, contiguous tensors.
#include "csrc/gated_delta_rule/chunk/join.cuh"
#include "csrc/gated_delta_rule/chunk/prepare.cuh"
#include "csrc/gated_delta_rule/chunk/sweep.cuh"
#include "csrc/gated_delta_rule/chunk/workspace.h"

namespace jet::hopper {

namespace {

constexpr int K = 64;

ChunkPlan plan_of(int64_t T) {
  return {T, 1, nullptr, IndexType::i64, nullptr, nullptr, chunks_of(T), 0, 0, static_cast<int>(chunks_of(T)), 1};
}

CUtensorMap map_of(const void* data, int64_t T, int64_t heads, int64_t D) {
  const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  return make_tensor_map({"tokens",
                          data,
                          Dtype::bf16,
                          4,
                          {size(D), size(heads), size(T), 1},
                          {2, size(2 * D), size(2 * D * heads), 16},
                          {64, 1, C, 1},
                          Swizzle::b128});
}

}  // namespace

// q, k [T, Hk, K], g, beta [T, H] -> images [chunks, H]
extern "C" void run_prepare(const void* q, const void* k, const float* g, const float* beta, char* images, int64_t T,
                            int64_t H, int64_t Hk, double scale, int64_t l2norm) {
  const TokenStrides gates{T * H, H, 1, 0};
  launch_prepare_as<PrepareConfig<K, bf16>>(
      {plan_of(T), Dtype::bf16, H, Hk, static_cast<float>(scale), l2norm != 0, g, beta, gates, gates, images},
      {map_of(q, T, Hk, K), map_of(k, T, Hk, K)}, nullptr);
}

// q, k [T, 1, K], v [T, 1, V], images [chunks, 1], initial_state [K, V] -> o [T, 1, V], final_state [K, V]
extern "C" void run_sweep(const void* q, const void* k, const void* v, const char* images, const float* initial_state,
                          float* final_state, uint16_t* o, int64_t T, int64_t V) {
  const SweepMaps maps{map_of(q, T, 1, K), map_of(k, T, 1, K), map_of(v, T, 1, V), map_of(o, T, 1, V)};
  launch_sweep<SweepConfig<K, true>>({plan_of(T),
                                      Dtype::bf16,
                                      1,
                                      1,
                                      K,
                                      V,
                                      static_cast<int>((V + kSlice - 1) / kSlice),
                                      0,
                                      false,
                                      images,
                                      initial_state,
                                      {K * V, K * V, V, 1},
                                      final_state,
                                      nullptr,
                                      nullptr,
                                      o},
                                     maps, nullptr);
}

// states [cuts, H, K, V], transfers [cuts, H, K, K] of one sequence, in place
extern "C" void run_join(float* states, const float* transfers, int64_t cuts, int64_t H, int64_t k, int64_t V) {
  ChunkPlan plan = plan_of((cuts + 1) * C);
  plan.row_segments = static_cast<int>(cuts) + 1, plan.most_cuts = static_cast<int>(cuts);
  const JoinArguments p{plan, H, V, states, transfers};
  const auto launch = k == 64    ? launch_join<64>
                      : k == 96  ? launch_join<96>
                      : k == 128 ? launch_join<128>
                                 : launch_join<256>;
  launch(p, nullptr);
}

// What choose_segments() makes of B rows of T tokens, or of N sequences in them: segments of a row, chunks of a
// segment, most cuts.
extern "C" void segments(int64_t B, int64_t T, int64_t N, int64_t H, int64_t k, int64_t V, int64_t packed,
                         int64_t multiprocessors, int64_t* found) {
  ChunkGatedDeltaRuleParams p = {};
  p.B = B, p.T = T, p.N = N, p.H = H, p.K = k, p.V = V;
  const ChunkSegments s =
      choose_segments(p, (V + kSlice - 1) / kSlice, transfer_slices(k), packed != 0, static_cast<int>(multiprocessors));
  found[0] = s.of_row, found[1] = s.chunks, found[2] = s.most_cuts;
}

}  // namespace jet::hopper
