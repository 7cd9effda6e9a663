// The launches, and all kernels but sweep: in files of their own they would spend most of their compile time on the
// same headers.
#include "csrc/gated_delta_rule/chunk/chunk_gated_delta_rule.h"

#include "csrc/gated_delta_rule/chunk/join.cuh"
#include "csrc/gated_delta_rule/chunk/plan_kernel.cuh"
#include "csrc/gated_delta_rule/chunk/prepare.cuh"
#include "csrc/gated_delta_rule/chunk/replay.cuh"
#include "csrc/gated_delta_rule/chunk/sweep_shared.cuh"
#include "csrc/gated_delta_rule/chunk/workspace.h"
#include "csrc/hopper/device.h"

namespace jet {

using namespace hopper;

namespace {

// Of a [B, T, heads, D] tensor: boxes of one chunk of one head, `columns` wide.
CUtensorMap tokens_map(const GatedDeltaRuleInputs& in, const char* name, const TokenTensor& x, int64_t heads, int64_t D,
                       int columns, Swizzle swizzle) {
  const auto bytes = [](int64_t extent, int64_t stride) { return static_cast<uint64_t>(extent > 1 ? stride * 2 : 16); };
  const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  const TokenStrides& s = x.strides;
  return make_tensor_map({.name = name,
                          .data = x.data,
                          .dtype = x.dtype,
                          .rank = 4,
                          .extent = {size(D), size(heads), size(in.T), size(in.B)},
                          .stride_bytes = {2, bytes(heads, s.h), bytes(in.T, s.t), bytes(in.B, s.b)},
                          .box = {static_cast<uint32_t>(columns), 1, C, 1},
                          .swizzle = swizzle});
}

int slices_of(const ChunkGatedDeltaRuleParams& p) { return static_cast<int>((p.in.V + kSlice - 1) / kSlice); }

ChunkSegments segments_of_call(const ChunkGatedDeltaRuleParams& p) {
  return choose_segments(p, slices_of(p), transfer_slices(p.in.K), current_device_properties().multiprocessors);
}

template <int K>
SweepMaps maps_of(const ChunkGatedDeltaRuleParams& p) {
  using Config = SweepConfig<K, true>;
  const GatedDeltaRuleInputs& in = p.in;
  const TokenTensor o{
      .data = p.o, .dtype = in.v.dtype, .strides = {.b = in.T * in.H * in.V, .t = in.H * in.V, .h = in.V, .d = 1}};
  return {.q = tokens_map(in, "q", in.q, in.Hk, in.K, Config::Rows::panel_width, Config::swizzle),
          .k = tokens_map(in, "k", in.k, in.Hk, in.K, Config::Rows::panel_width, Config::swizzle),
          .v = tokens_map(in, "v", in.v, in.H, in.V, kRows, ValueTile::swizzle),
          .o = tokens_map(in, "o", o, in.H, in.V, kRows, ValueTile::swizzle)};
}

// Here and not in a header: where sweep.cuh is included it would instantiate the kernels of both files.
void launch_sweep(const SweepArguments& p, const SweepMaps& maps, bool outputs, cudaStream_t stream) {
  (p.K <= kMostNarrowK ? launch_sweep_part<true> : launch_sweep_part<false>)(p, maps, outputs, stream);
}

ChunkPlan plan_of(const ChunkGatedDeltaRuleParams& p, const ChunkSegments& segments, const ChunkWorkspace& w,
                  char* workspace) {
  const bool packed = p.cu_seqlens.data != nullptr;
  return {.T = p.in.T,
          .N = p.N,
          .cu_seqlens = p.cu_seqlens,
          .first_chunk = packed ? reinterpret_cast<int*>(workspace + w.first_chunk) : nullptr,
          .first_cut = packed ? reinterpret_cast<int*>(workspace + w.first_cut) : nullptr,
          .most_chunks = w.most_chunks,
          .most_cuts = segments.most_cuts,
          .segment_chunks = segments.chunks,
          .row_chunks = static_cast<int>(chunks_of(p.in.T)),
          .row_segments = segments.of_row};
}

template <int K>
void launch_chunk_kernels(const ChunkGatedDeltaRuleParams& p, char* workspace, cudaStream_t stream) {
  const GatedDeltaRuleInputs& in = p.in;
  const ChunkSegments segments = segments_of_call(p);
  const ChunkWorkspace w = chunk_workspace(p, segments);
  const ChunkPlan plan = plan_of(p, segments, w, workspace);
  const float scale = static_cast<float>(in.scale);
  char* const images = workspace + w.images;
  if (plan.cu_seqlens.data != nullptr)
    launch(kChunkOp, {.grid = dim3(1), .threads = kPlanThreads, .programmatic = true}, stream, chunk_plan_kernel, plan);
  SweepMaps maps = {};
  if (in.T > 0) {
    maps = maps_of<K>(p);
    launch_prepare<K>({.plan = plan,
                       .dtype = in.q.dtype,
                       .H = in.H,
                       .Hk = in.Hk,
                       .scale = scale,
                       .l2norm = in.l2norm_qk,
                       .g = static_cast<const float*>(in.g.data),
                       .beta = static_cast<const float*>(in.beta.data),
                       .g_strides = in.g.strides,
                       .beta_strides = in.beta.strides,
                       .images = images},
                      {.q = maps.q, .k = maps.k}, stream);
  }
  const SweepArguments sweep{.plan = plan,
                             .dtype = in.q.dtype,
                             .H = in.H,
                             .Hk = in.Hk,
                             .K = in.K,
                             .V = in.V,
                             .slices = slices_of(p),
                             .scale = scale,
                             .l2norm = in.l2norm_qk,
                             .images = images,
                             .initial_state = static_cast<const float*>(p.initial_state.data),
                             .initial_state_strides = p.initial_state.strides,
                             .final_state = static_cast<float*>(p.final_state),
                             .states = reinterpret_cast<float*>(workspace + w.states),
                             .transfers = reinterpret_cast<float*>(workspace + w.transfers),
                             .o = static_cast<uint16_t*>(p.o)};
  if (plan.most_cuts > 0) {
    launch_sweep(sweep, maps, false, stream);
    launch_join<K>({.plan = plan, .H = in.H, .V = in.V, .states = sweep.states, .transfers = sweep.transfers}, stream);
  }
  launch_sweep(sweep, maps, true, stream);
  if (in.T == 0) return;
  static_assert(kSlice == kReplayThreads);
  const int64_t ctas = p.N * in.H * sweep.slices;  // not more than sweep's
  launch(kChunkOp, {.grid = dim3(static_cast<unsigned>(ctas)), .threads = kReplayThreads, .programmatic = true}, stream,
         chunk_replay_kernel, ReplayArguments{.plan = plan, .p = p, .slices = sweep.slices});
}

}  // namespace

int64_t chunk_gated_delta_rule_workspace(const ChunkGatedDeltaRuleParams& p) {
  return p.N * p.in.H == 0 ? 0 : chunk_workspace(p, segments_of_call(p)).bytes;
}

void chunk_gated_delta_rule_hopper(const ChunkGatedDeltaRuleParams& p, void* workspace, void* stream) {
  if (p.N * p.in.H == 0) return;
  HopperHeadDims::dispatch(p.in.K, [&](auto K) {
    launch_chunk_kernels<K>(p, static_cast<char*>(workspace), static_cast<cudaStream_t>(stream));
  });
}

}  // namespace jet
