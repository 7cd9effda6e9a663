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

void launch_plan(const ChunkPlan& plan, cudaStream_t stream, const PrefillStates& states) {
  if (plan.cu_seqlens.data == nullptr) return;
  launch(kChunkOp, {.grid = dim3(1), .threads = kPlanThreads, .programmatic = true}, stream, chunk_plan_kernel, plan,
         states);
}

void launch_join(int64_t K, const JoinArguments& p, cudaStream_t stream) {
  HopperHeadDims::dispatch(K, [&](auto dim) { launch_join_kernel<dim>(p, stream); });
}

}  // namespace hopper

namespace {

// `states`: of a prefill, whose final states are in the workspace until replay puts them into the pool: segments of a
// sequence are under way at the same time, and the first must find the row as it was.
template <int K>
void launch_chunk_kernels(const ChunkGatedDeltaRuleParams& p, const PrefillStates& states, int* marks, char* workspace,
                          cudaStream_t stream) {
  const GatedDeltaRuleInputs& in = p.in;
  const ChunkSegments segments = segments_of_call(p);
  const ChunkWorkspace w = chunk_workspace(p, segments);
  ChunkPlan plan = plan_of(p, segments, w, workspace);
  plan.marks = marks;
  const float scale = static_cast<float>(in.scale);
  char* const images = workspace + w.images;
  launch_plan(plan, stream, states);
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
                             .prefill = states,
                             .final_state = static_cast<float*>(p.final_state),
                             .states = reinterpret_cast<float*>(workspace + w.states),
                             .transfers = reinterpret_cast<float*>(workspace + w.transfers),
                             .o = static_cast<uint16_t*>(p.o)};
  if (plan.most_cuts > 0) {
    launch_sweep(sweep, maps, false, stream);
    launch_join(K, {.plan = plan, .H = in.H, .V = in.V, .states = sweep.states, .transfers = sweep.transfers}, stream);
  }
  launch_sweep(sweep, maps, true, stream);
  const bool on_pool = states.pool.data != nullptr;
  if (in.T == 0 && !on_pool) return;
  static_assert(kSlice == kReplayThreads);
  const int64_t ctas = p.N * in.H * sweep.slices;  // not more than sweep's
  launch(kChunkOp, {.grid = dim3(static_cast<unsigned>(ctas)), .threads = kReplayThreads, .programmatic = true}, stream,
         on_pool ? chunk_replay_kernel<true> : chunk_replay_kernel<false>,
         ReplayArguments{.plan = plan, .p = p, .prefill = states, .slices = sweep.slices});
}

struct PrefillWorkspace {
  // Offsets.
  int64_t final_states;  // [N, H, K, V] fp32
  int64_t marks;         // [most_chunks] int32, with marks
  int64_t bytes;
};

PrefillWorkspace prefill_workspace(const PrefillGatedDeltaRuleParams& p) {
  const GatedDeltaRuleInputs& in = p.forward.in;
  const ChunkWorkspace w = chunk_workspace(p.forward, segments_of_call(p.forward));
  const int64_t marks = w.bytes + p.forward.N * in.H * in.K * in.V * 4;
  return {.final_states = w.bytes, .marks = marks, .bytes = marks + (p.states.M > 0 ? w.most_chunks * 4 : 0)};
}

}  // namespace

int64_t chunk_gated_delta_rule_workspace(const ChunkGatedDeltaRuleParams& p) {
  return p.N * p.in.H == 0 ? 0 : chunk_workspace(p, segments_of_call(p)).bytes;
}

void chunk_gated_delta_rule_hopper(const ChunkGatedDeltaRuleParams& p, void* workspace, void* stream) {
  if (p.N * p.in.H == 0) return;
  HopperHeadDims::dispatch(p.in.K, [&](auto K) {
    launch_chunk_kernels<K>(p, {}, nullptr, static_cast<char*>(workspace), static_cast<cudaStream_t>(stream));
  });
}

int64_t prefill_gated_delta_rule_workspace(const PrefillGatedDeltaRuleParams& p) {
  return p.forward.N * p.forward.in.H == 0 ? 0 : prefill_workspace(p).bytes;
}

void prefill_gated_delta_rule_hopper(const PrefillGatedDeltaRuleParams& p, void* workspace, void* stream) {
  if (p.forward.N * p.forward.in.H == 0) return;
  const PrefillWorkspace w = prefill_workspace(p);
  char* const memory = static_cast<char*>(workspace);
  ChunkGatedDeltaRuleParams forward = p.forward;
  forward.final_state = memory + w.final_states;
  int* const marks = p.states.M > 0 ? reinterpret_cast<int*>(memory + w.marks) : nullptr;
  PrefillStates states = p.states;
  if (states.pool.data == nullptr) states.pool.data = memory;  // a pool without rows is one all the same
  HopperHeadDims::dispatch(forward.in.K, [&](auto K) {
    launch_chunk_kernels<K>(forward, states, marks, memory, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace jet
