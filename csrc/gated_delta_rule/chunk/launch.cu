// The launcher, and all kernels but sweep: in a file of their own they would spend most of their compile time on the
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

constexpr const char* kOp = "chunk_gated_delta_rule";

// Of a [B, T, heads, D] tensor: boxes of 64 tokens of one head, `columns` wide.
CUtensorMap tokens_map(const ChunkGatedDeltaRuleParams& p, const char* name, const void* data, const TokenStrides& s,
                       int64_t heads, int64_t D, int columns, Swizzle swizzle) {
  const auto bytes = [](int64_t extent, int64_t stride) { return static_cast<uint64_t>(extent > 1 ? stride * 2 : 16); };
  const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  return make_tensor_map({name,
                          data,
                          p.dtype,
                          4,
                          {size(D), size(heads), size(p.T), size(p.B)},
                          {2, bytes(heads, s.h), bytes(p.T, s.t), bytes(p.B, s.b)},
                          {static_cast<uint32_t>(columns), 1, C, 1},
                          swizzle});
}

int slices_of(const ChunkGatedDeltaRuleParams& p) { return static_cast<int>((p.V + kSlice - 1) / kSlice); }

ChunkSegments segments_of_call(const ChunkGatedDeltaRuleParams& p, bool packed) {
  return choose_segments(p, slices_of(p), transfer_slices(p.K), packed, current_device_facts().multiprocessors);
}

template <int K>
SweepMaps maps_of(const ChunkGatedDeltaRuleParams& p) {
  using Config = SweepConfig<K, true>;
  const TokenStrides o_strides{p.T * p.H * p.V, p.H * p.V, p.V, 1};
  SweepMaps maps = {};
  maps.q = tokens_map(p, "q", p.q, p.q_strides, p.Hk, p.K, Config::Rows::panel_width, Config::swizzle);
  maps.k = tokens_map(p, "k", p.k, p.k_strides, p.Hk, p.K, Config::Rows::panel_width, Config::swizzle);
  maps.v = tokens_map(p, "v", p.v, p.v_strides, p.H, p.V, kRows, ValueTile::swizzle);
  maps.o = tokens_map(p, "o", p.o, o_strides, p.H, p.V, kRows, ValueTile::swizzle);
  return maps;
}

template <int K>
void run(const ChunkGatedDeltaRuleLaunch& l, cudaStream_t stream) {
  const ChunkGatedDeltaRuleParams& p = l.p;
  const bool packed = l.cu_seqlens.data != nullptr;
  const ChunkSegments segments = segments_of_call(p, packed);
  const ChunkWorkspace w = chunk_workspace(p, packed, segments);
  char* workspace = static_cast<char*>(l.workspace);
  ChunkPlan plan{p.T,
                 p.N,
                 l.cu_seqlens.data,
                 l.cu_seqlens.type,
                 nullptr,
                 nullptr,
                 w.most_chunks,
                 segments.most_cuts,
                 segments.chunks,
                 static_cast<int>(chunks_of(p.T)),
                 segments.of_row};
  if (packed) {
    plan.first_chunk = reinterpret_cast<int*>(workspace + w.first_chunk),
    plan.first_cut = reinterpret_cast<int*>(workspace + w.first_cut);
    launch(kOp, {dim3(1), kPlanThreads, 0, 1, true}, stream, chunk_plan_kernel, plan);
  }
  char* images = workspace + w.images;
  SweepMaps maps = {};
  if (p.T > 0) {
    maps = maps_of<K>(p);
    launch_prepare<K>(
        {plan, p.dtype, p.H, p.Hk, static_cast<float>(p.scale), p.l2norm_qk, static_cast<const float*>(p.g),
         static_cast<const float*>(p.beta), p.g_strides, p.beta_strides, images},
        {maps.q, maps.k}, stream);
  }
  const SweepArguments sweep{plan,
                             p.dtype,
                             p.H,
                             p.Hk,
                             p.K,
                             p.V,
                             slices_of(p),
                             static_cast<float>(p.scale),
                             p.l2norm_qk,
                             images,
                             static_cast<const float*>(p.initial_state),
                             p.initial_state_strides,
                             static_cast<float*>(p.final_state),
                             reinterpret_cast<float*>(workspace + w.states),
                             reinterpret_cast<float*>(workspace + w.transfers),
                             static_cast<uint16_t*>(p.o)};
  if (plan.most_cuts > 0) {
    launch_sweep<SweepConfig<K, false>>(sweep, maps, stream);
    launch_join<K>({plan, p.H, p.V, sweep.states, sweep.transfers}, stream);
  }
  launch_sweep<SweepConfig<K, true>>(sweep, maps, stream);
  if (p.T == 0) return;
  static_assert(K <= kReplayMostK && K % kReplayBatch == 0 && kSlice == kReplayThreads);
  const int64_t ctas = p.N * p.H * sweep.slices;  // not more than sweep's
  launch(kOp, {dim3(static_cast<unsigned>(ctas)), kReplayThreads, 0, 1, true}, stream, chunk_replay_kernel,
         ReplayArguments{plan, p, sweep.slices});
}

}  // namespace

int64_t chunk_gated_delta_rule_workspace(const ChunkGatedDeltaRuleParams& p, bool packed) {
  return p.N * p.H == 0 ? 0 : chunk_workspace(p, packed, segments_of_call(p, packed)).bytes;
}

void chunk_gated_delta_rule_hopper(const ChunkGatedDeltaRuleLaunch& l, void* stream) {
  if (l.p.N * l.p.H == 0) return;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (l.p.K) {
    case 64: return run<64>(l, on);
    case 96: return run<96>(l, on);
    case 128: return run<128>(l, on);
    case 192: return run<192>(l, on);
    default: return run<256>(l, on);
  }
}

}  // namespace jet
