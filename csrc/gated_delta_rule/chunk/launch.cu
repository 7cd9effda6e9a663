// The launches, and all kernels but sweep: in files of their own they would spend most of their compile time on the
// same headers.
#include "csrc/gated_delta_rule/chunk/chunk_gated_delta_rule.h"

#include "csrc/gated_delta_rule/chunk/join.cuh"
#include "csrc/gated_delta_rule/chunk/launches.cuh"
#include "csrc/gated_delta_rule/chunk/plan_kernel.cuh"
#include "csrc/gated_delta_rule/chunk/prepare.cuh"
#include "csrc/gated_delta_rule/chunk/replay.cuh"

namespace jet {

using namespace hopper;

namespace hopper {

void launch_plan(const ChunkPlan& plan, cudaStream_t stream) {
  if (plan.cu_seqlens.data == nullptr) return;
  launch(kChunkOp, {.grid = dim3(1), .threads = kPlanThreads, .programmatic = true}, stream, chunk_plan_kernel, plan);
}

void launch_join(int64_t K, const JoinArguments& p, cudaStream_t stream) {
  HopperHeadDims::dispatch(K, [&](auto dim) { launch_join_kernel<dim>(p, stream); });
}

}  // namespace hopper

namespace {

template <int K>
void launch_chunk_kernels(const ChunkGatedDeltaRuleParams& p, char* workspace, cudaStream_t stream) {
  const GatedDeltaRuleInputs& in = p.in;
  const ChunkSegments segments = segments_of_call(p);
  const ChunkWorkspace w = chunk_workspace(p, segments);
  const ChunkPlan plan = plan_of(p, segments, w, workspace);
  const float scale = static_cast<float>(in.scale);
  char* const images = workspace + w.images;
  launch_plan(plan, stream);
  SweepMaps maps = {};
  if (in.T > 0) {
    maps = sweep_maps(in, in.v, p.o);
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
                             .image_bytes = kImageBytes,
                             .initial_state = static_cast<const float*>(p.initial_state.data),
                             .initial_state_strides = p.initial_state.strides,
                             .final_state = static_cast<float*>(p.final_state),
                             .states = reinterpret_cast<float*>(workspace + w.states),
                             .transfers = reinterpret_cast<float*>(workspace + w.transfers),
                             .o = static_cast<uint16_t*>(p.o)};
  if (plan.most_cuts > 0) {
    launch_sweep(sweep, maps, false, stream);
    launch_join(K, {.plan = plan, .H = in.H, .V = in.V, .states = sweep.states, .transfers = sweep.transfers}, stream);
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
