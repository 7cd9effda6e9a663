// The launches of the backward, and its `prepare`.
#include "csrc/gated_delta_rule/chunk/backward/backward.cuh"
#include "csrc/gated_delta_rule/chunk/backward/workspace.h"
#include "csrc/gated_delta_rule/chunk/launches.cuh"
#include "csrc/gated_delta_rule/chunk/prepare.cuh"

namespace jet {

using namespace hopper;

namespace {

struct BackwardCall {
  const ChunkGatedDeltaRuleBackwardParams& p;
  const GatedDeltaRuleInputs& in;
  ChunkSegments segments;
  int gradient_ctas;
  BackwardWorkspace w;

  explicit BackwardCall(const ChunkGatedDeltaRuleBackwardParams& params)
      : p(params), in(params.forward.in), segments(segments_of_call(params.forward)) {
    const int64_t items = chunk_workspace(p.forward, segments).most_chunks * in.Hk;
    gradient_ctas = static_cast<int>(std::min<int64_t>(items, current_device_properties().multiprocessors));
    const bool kept = in.H > in.Hk || in.K > 128;  // gradients of q and k, from head to head or part to part
    w = backward_workspace(p.forward, segments, kept ? gradient_ctas * 2 * C * in.K * 4 : 0);
  }
  bool is_bf16() const { return in.q.dtype == Dtype::bf16; }
};

template <int K>
void launch_backward_prepare(const BackwardCall& call, const ChunkPlan& plan, const SweepMaps& maps, char* images,
                             cudaStream_t stream) {
  const GatedDeltaRuleInputs& in = call.in;
  launch_prepare<K, true>({.plan = plan,
                           .dtype = in.q.dtype,
                           .H = in.H,
                           .Hk = in.Hk,
                           .scale = static_cast<float>(in.scale),
                           .l2norm = in.l2norm_qk,
                           .g = static_cast<const float*>(in.g.data),
                           .beta = static_cast<const float*>(in.beta.data),
                           .g_strides = in.g.strides,
                           .beta_strides = in.beta.strides,
                           .images = images},
                          {.q = maps.q, .k = maps.k}, stream);
}

// Gradients of the states at cuts and of chunks.
void launch_reverse(const BackwardCall& call, SweepArguments sweep, char* workspace, cudaStream_t stream) {
  const GatedDeltaRuleInputs& in = call.in;
  const BackwardWorkspace& w = call.w;
  SweepMaps maps = {};
  if (in.T > 0) maps = sweep_maps(in, call.p.grad_o, call.p.dv);
  const auto launch_pass = call.is_bf16() ? launch_reverse_bf16 : launch_reverse_f16;
  sweep.initial_state = static_cast<const float*>(call.p.grad_final_state.data);
  sweep.initial_state_strides = call.p.grad_final_state.strides;
  sweep.final_state = static_cast<float*>(call.p.dinitial_state);
  sweep.states = reinterpret_cast<float*>(workspace + w.cut_gradients);
  sweep.chunk_states = workspace + w.state_gradients, sweep.chunk_updates = nullptr;
  sweep.o = static_cast<uint16_t*>(call.p.dv);
  if (sweep.plan.most_cuts > 0) {
    sweep.cuts = true;
    launch_pass(sweep, maps, stream);
    sweep.cuts = false;
    launch_join(in.K,
                {.plan = sweep.plan,
                 .H = in.H,
                 .V = in.V,
                 .states = sweep.states,
                 .transfers = sweep.transposed_transfers,
                 .reverse = true},
                stream);
  }
  launch_pass(sweep, maps, stream);
}

void launch_gradients(const BackwardCall& call, const ChunkPlan& plan, char* workspace, cudaStream_t stream) {
  const GatedDeltaRuleInputs& in = call.in;
  const ChunkGatedDeltaRuleBackwardParams& p = call.p;
  const BackwardWorkspace& w = call.w;
  const SweepMaps maps = sweep_maps(in, p.grad_o, p.dv);
  const Swizzle swizzle = rows_swizzle(in.K <= 128 ? in.K : in.K / 2);
  const GradientMaps gradient_maps{
      .q = rows_map(in, "q", in.q, swizzle), .k = rows_map(in, "k", in.k, swizzle), .grad_o = maps.v, .dv = maps.o};
  const GradientArguments arguments{.plan = plan,
                                    .H = in.H,
                                    .Hk = in.Hk,
                                    .V = in.V,
                                    .scale = static_cast<float>(in.scale),
                                    .l2norm = in.l2norm_qk,
                                    .images = workspace + w.forward.images,
                                    .states = workspace + w.states,
                                    .state_gradients = workspace + w.state_gradients,
                                    .updates = workspace + w.updates,
                                    .g = static_cast<const float*>(in.g.data),
                                    .g_strides = in.g.strides,
                                    .dq = p.dq,
                                    .dk = p.dk,
                                    .dg = static_cast<float*>(p.dg),
                                    .dbeta = static_cast<float*>(p.dbeta),
                                    .accumulators = reinterpret_cast<float*>(workspace + w.accumulators)};
  (call.is_bf16() ? launch_gradients_bf16 : launch_gradients_f16)(in.K, arguments, gradient_maps, call.gradient_ctas,
                                                                  stream);
}

void launch_backward(const BackwardCall& call, char* workspace, cudaStream_t stream) {
  const GatedDeltaRuleInputs& in = call.in;
  const BackwardWorkspace& w = call.w;
  const ChunkPlan plan = plan_of(call.p.forward, call.segments, w.forward, workspace);
  launch_plan(plan, stream);
  SweepArguments sweep{.plan = plan,
                       .dtype = in.q.dtype,
                       .H = in.H,
                       .Hk = in.Hk,
                       .K = in.K,
                       .V = in.V,
                       .slices = slices_of(call.p.forward),
                       .scale = static_cast<float>(in.scale),
                       .l2norm = in.l2norm_qk,
                       .images = workspace + w.forward.images,
                       .image_bytes = kBackwardImageBytes,
                       .initial_state = static_cast<const float*>(call.p.forward.initial_state.data),
                       .initial_state_strides = call.p.forward.initial_state.strides,
                       .final_state = nullptr,
                       .states = reinterpret_cast<float*>(workspace + w.forward.states),
                       .transfers = reinterpret_cast<float*>(workspace + w.forward.transfers),
                       .transposed_transfers = reinterpret_cast<float*>(workspace + w.transposed_transfers),
                       .o = nullptr,
                       .chunk_states = workspace + w.states,
                       .chunk_updates = workspace + w.updates};
  if (in.T > 0) {
    const SweepMaps maps = sweep_maps(in, in.v, call.p.dv);  // of these passes none writes outputs
    HopperHeadDims::dispatch(
        in.K, [&](auto K) { launch_backward_prepare<K>(call, plan, maps, workspace + w.forward.images, stream); });
    if (plan.most_cuts > 0) {
      launch_sweep(sweep, maps, false, stream);
      launch_join(in.K, {.plan = plan, .H = in.H, .V = in.V, .states = sweep.states, .transfers = sweep.transfers},
                  stream);
    }
    launch_states(sweep, maps, stream);
  }
  launch_reverse(call, sweep, workspace, stream);
  if (in.T > 0) launch_gradients(call, plan, workspace, stream);
}

}  // namespace

int64_t chunk_gated_delta_rule_backward_workspace(const ChunkGatedDeltaRuleBackwardParams& p) {
  return p.forward.N * p.forward.in.H == 0 ? 0 : BackwardCall(p).w.bytes;
}

void chunk_gated_delta_rule_backward_hopper(const ChunkGatedDeltaRuleBackwardParams& p, void* workspace, void* stream) {
  const GatedDeltaRuleInputs& in = p.forward.in;
  if (in.H == 0) {  // keys and queries that no head reads
    const int64_t bytes = in.B * in.T * in.Hk * in.K * 2;
    for (void* gradient : {p.dq, p.dk})
      if (bytes > 0) check(cudaMemsetAsync(gradient, 0, bytes, static_cast<cudaStream_t>(stream)), kChunkBackwardOp);
  }
  if (p.forward.N * in.H == 0) return;
  launch_backward(BackwardCall(p), static_cast<char*>(workspace), static_cast<cudaStream_t>(stream));
}

}  // namespace jet
