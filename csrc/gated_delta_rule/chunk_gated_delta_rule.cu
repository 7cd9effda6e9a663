#include "csrc/gated_delta_rule/chunk_gated_delta_rule.h"

#include "csrc/gated_delta_rule/chunk_prepare.cuh"
#include "csrc/gated_delta_rule/chunk_sweep_shared.cuh"
#include "csrc/gated_delta_rule/chunk_workspace.h"

namespace jet {

using namespace hopper;

namespace {

constexpr const char* kOp = "chunk_gated_delta_rule";

// Of a [B, T, heads, D] tensor: boxes of 64 tokens of one head, `columns` wide.
CUtensorMap tokens_map(const ChunkGatedDeltaRuleParams& p, const char* name, const void* data, const TokenStrides& s, int64_t heads, int64_t D,
                       int columns, Swizzle swizzle) {
  const auto bytes = [](int64_t extent, int64_t stride) { return static_cast<uint64_t>(extent > 1 ? stride * 2 : 16); };
  const auto size = [](int64_t n) { return static_cast<uint64_t>(n); };
  return make_tensor_map({name, data, p.dtype, 4, {size(D), size(heads), size(p.T), size(p.B)},
                          {2, bytes(heads, s.h), bytes(p.T, s.t), bytes(p.B, s.b)}, {static_cast<uint32_t>(columns), 1, C, 1}, swizzle});
}

ChunkPlan chunk_plan(const ChunkGatedDeltaRuleLaunch& launch, const ChunkWorkspace& w) {
  ChunkPlan plan{launch.p.T, launch.p.N, launch.cu_seqlens.data, launch.cu_seqlens.type, nullptr, w.most_chunks};
  if (launch.cu_seqlens.data != nullptr) plan.first_chunk = reinterpret_cast<int*>(static_cast<char*>(launch.workspace) + w.first_chunk);
  return plan;
}

template <int K>
void run(const ChunkGatedDeltaRuleLaunch& l, cudaStream_t stream) {
  const ChunkGatedDeltaRuleParams& p = l.p;
  const ChunkWorkspace w = chunk_workspace(p, l.cu_seqlens.data != nullptr);
  const ChunkPlan plan = chunk_plan(l, w);
  if (plan.first_chunk != nullptr) launch(kOp, {dim3(1), kPlanThreads}, stream, chunk_plan_kernel, plan);
  char* images = static_cast<char*>(l.workspace) + w.images;
  if (w.most_chunks > 0 && p.T > 0)
    launch_prepare<PrepareConfig<K>>({plan, p.dtype, p.H, p.Hk, static_cast<float>(p.scale), p.l2norm_qk, p.q, p.k, static_cast<const float*>(p.g),
                                      static_cast<const float*>(p.beta), p.q_strides, p.k_strides, p.g_strides, p.beta_strides, images},
                                     stream);
  using Config = SweepConfig<K>;
  SweepMaps maps = {};
  if (p.T > 0) {
    const TokenStrides o_strides{p.T * p.H * p.V, p.H * p.V, p.V, 1};
    maps.q = tokens_map(p, "q", p.q, p.q_strides, p.Hk, p.K, Config::Rows::panel_width, Config::swizzle);
    maps.k = tokens_map(p, "k", p.k, p.k_strides, p.Hk, p.K, Config::Rows::panel_width, Config::swizzle);
    maps.v = tokens_map(p, "v", p.v, p.v_strides, p.H, p.V, kRows, ValueTile::swizzle);
    maps.o = tokens_map(p, "o", p.o, o_strides, p.H, p.V, kRows, ValueTile::swizzle);
  }
  launch_sweep<Config>({plan, p.dtype, p.H, p.Hk, p.V, static_cast<int>((p.V + kSlice - 1) / kSlice), images,
                        static_cast<const float*>(p.initial_state), p.initial_state_strides, static_cast<float*>(p.final_state),
                        static_cast<uint16_t*>(p.o)},
                       maps, stream);
}

}  // namespace

int64_t chunk_gated_delta_rule_workspace(const ChunkGatedDeltaRuleParams& p, bool packed) { return chunk_workspace(p, packed).bytes; }

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
