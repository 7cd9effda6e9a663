// What the launches of forward and backward have in common: tensor maps, segments, the plan.
#pragma once

#include "csrc/gated_delta_rule/chunk/sweep_shared.cuh"
#include "csrc/gated_delta_rule/chunk/workspace.h"
#include "csrc/hopper/device.h"

namespace jet::hopper {

// Of a [B, T, heads, D] tensor: boxes of one chunk of one head, `columns` wide.
inline CUtensorMap tokens_map(const GatedDeltaRuleInputs& in, const char* name, const TokenTensor& x, int64_t heads,
                              int64_t D, int columns, Swizzle swizzle) {
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

// What sweep reads and writes, and with dO in v's place and dV in o's what reverse does. Boxes of q and k are a panel
// wide.
constexpr Swizzle rows_swizzle(int64_t columns) { return columns % 64 == 0 ? Swizzle::b128 : Swizzle::b64; }
inline CUtensorMap rows_map(const GatedDeltaRuleInputs& in, const char* name, const TokenTensor& x, Swizzle swizzle) {
  return tokens_map(in, name, x, in.Hk, in.K, static_cast<int>(swizzle) / 2, swizzle);
}
inline SweepMaps sweep_maps(const GatedDeltaRuleInputs& in, const TokenTensor& v, void* o) {
  const TokenTensor out{
      .data = o, .dtype = in.v.dtype, .strides = {.b = in.T * in.H * in.V, .t = in.H * in.V, .h = in.V, .d = 1}};
  return {.q = rows_map(in, "q", in.q, rows_swizzle(in.K)),
          .k = rows_map(in, "k", in.k, rows_swizzle(in.K)),
          .v = tokens_map(in, "v", v, in.H, in.V, kRows, ValueTile::swizzle),
          .o = tokens_map(in, "o", out, in.H, in.V, kRows, ValueTile::swizzle)};
}

inline int slices_of(const ChunkGatedDeltaRuleParams& p) { return static_cast<int>((p.in.V + kSlice - 1) / kSlice); }

inline ChunkSegments segments_of_call(const ChunkGatedDeltaRuleParams& p) {
  return choose_segments(p, slices_of(p), transfer_slices(p.in.K), current_device_properties().multiprocessors);
}

inline ChunkPlan plan_of(const ChunkGatedDeltaRuleParams& p, const ChunkSegments& segments, const ChunkWorkspace& w,
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

// In launch.cu.
void launch_plan(const ChunkPlan& plan, cudaStream_t stream, const PrefillStates& states = {});
void launch_join(int64_t K, const JoinArguments& p, cudaStream_t stream);

// Not where sweep.cuh is included: that would instantiate the kernels of both files.
inline void launch_sweep(const SweepArguments& p, const SweepMaps& maps, bool outputs, cudaStream_t stream) {
  (p.K <= kMostNarrowK ? launch_sweep_part<true> : launch_sweep_part<false>)(p, maps, outputs, stream);
}

}  // namespace jet::hopper
