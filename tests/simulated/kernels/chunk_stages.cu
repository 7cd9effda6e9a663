// The stages of the chunked gated delta rule one by one, for tests: one sequence, K = 64, bf16, contiguous tensors.
#include "csrc/gated_delta_rule/chunk/join.cuh"
#include "csrc/gated_delta_rule/chunk/prepare.cuh"
#include "csrc/gated_delta_rule/chunk/sweep.cuh"
#include "csrc/gated_delta_rule/chunk/workspace.h"

namespace jet::hopper {

namespace {

constexpr int K = 64;

ChunkPlan plan_of(int64_t T) {
  return {.T = T,
          .N = 1,
          .cu_seqlens = {},
          .first_chunk = nullptr,
          .first_cut = nullptr,
          .most_chunks = chunks_of(T),
          .most_cuts = 0,
          .segment_chunks = 0,
          .row_chunks = static_cast<int>(chunks_of(T)),
          .row_segments = 1};
}

CUtensorMap map_of(const void* data, int64_t T, int64_t heads, int64_t D) {
  const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  return make_tensor_map({.name = "tokens",
                          .data = data,
                          .dtype = Dtype::bf16,
                          .rank = 4,
                          .extent = {size(D), size(heads), size(T), 1},
                          .stride_bytes = {2, size(2 * D), size(2 * D * heads), 16},
                          .box = {64, 1, C, 1},
                          .swizzle = Swizzle::b128});
}

}  // namespace

// q, k [T, Hk, K], g, beta [T, H] -> images [chunks, H]
extern "C" void run_prepare(const void* q, const void* k, const float* g, const float* beta, char* images, int64_t T,
                            int64_t H, int64_t Hk, double scale, int64_t l2norm) {
  const TokenStrides gates{.b = T * H, .t = H, .h = 1, .d = 0};
  launch_prepare<K>({.plan = plan_of(T),
                     .dtype = Dtype::bf16,
                     .H = H,
                     .Hk = Hk,
                     .scale = static_cast<float>(scale),
                     .l2norm = l2norm != 0,
                     .g = g,
                     .beta = beta,
                     .g_strides = gates,
                     .beta_strides = gates,
                     .images = images},
                    {.q = map_of(q, T, Hk, K), .k = map_of(k, T, Hk, K)}, nullptr);
}

// q, k [T, 1, K], v [T, 1, V], images [chunks, 1], initial_state [K, V] -> o [T, 1, V], final_state [K, V]
extern "C" void run_sweep(const void* q, const void* k, const void* v, const char* images, const float* initial_state,
                          float* final_state, uint16_t* o, int64_t T, int64_t V) {
  const SweepMaps maps{
      .q = map_of(q, T, 1, K), .k = map_of(k, T, 1, K), .v = map_of(v, T, 1, V), .o = map_of(o, T, 1, V)};
  launch_sweep_kernel<SweepConfig<K, SweepPass::outputs>>(
      {.plan = plan_of(T),
       .dtype = Dtype::bf16,
       .H = 1,
       .Hk = 1,
       .K = K,
       .V = V,
       .slices = static_cast<int>((V + kSlice - 1) / kSlice),
       .scale = 0,
       .l2norm = false,
       .images = images,
       .image_bytes = kImageBytes,
       .initial_state = initial_state,
       .initial_state_strides = {.n = K * V, .h = K * V, .k = V, .v = 1},
       .final_state = final_state,
       .states = nullptr,
       .transfers = nullptr,
       .o = o},
      maps, nullptr);
}

// states [cuts, H, K, V], transfers [cuts, H, K, K] of one sequence, in place
extern "C" void run_join(float* states, const float* transfers, int64_t cuts, int64_t H, int64_t k, int64_t V) {
  ChunkPlan plan = plan_of((cuts + 1) * C);
  plan.row_segments = static_cast<int>(cuts) + 1, plan.most_cuts = static_cast<int>(cuts);
  const JoinArguments p{.plan = plan, .H = H, .V = V, .states = states, .transfers = transfers};
  HopperHeadDims::dispatch(k, [&](auto head_dim) { launch_join_kernel<head_dim>(p, nullptr); });
}

// What choose_segments() makes of B rows of T tokens, or of N sequences in them: segments of a row, chunks of a
// segment, most cuts.
extern "C" void segments(int64_t B, int64_t T, int64_t N, int64_t H, int64_t k, int64_t V, int64_t packed,
                         int64_t multiprocessors, int64_t* found) {
  const ChunkGatedDeltaRuleParams p{.in = {.B = B, .T = T, .H = H, .Hk = H, .K = k, .V = V},
                                    .N = N,
                                    .cu_seqlens = {.data = packed != 0 ? found : nullptr}};
  const ChunkSegments s =
      choose_segments(p, (V + kSlice - 1) / kSlice, transfer_slices(k), static_cast<int>(multiprocessors));
  found[0] = s.of_row, found[1] = s.chunks, found[2] = s.most_cuts;
}

}  // namespace jet::hopper
