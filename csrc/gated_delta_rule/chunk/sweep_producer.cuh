// The producer warpgroup of `sweep` (sweep.cuh): one thread loads the stages of the ring, three warps turn the rows of
// k and q in them into fp16 of norm 1.
#pragma once

#include "csrc/gated_delta_rule/chunk/sweep_shared.cuh"

namespace jet::hopper {

// One thread's loop, which nothing else hides: what does not change from chunk to chunk is in registers, not in shared
// memory.
template <class Config>
__device__ void load_chunks(const SweepArguments& p, const SweepMaps& maps, const SweepWork& work,
                            SweepShared<Config>& shared) {
  using Rows = typename Config::Rows;
  const int chunks = work.chunks, row = static_cast<int>(work.row), h = work.h, hk = work.hk, column = work.column;
  const int groups = work.is_transfer() ? 0 : work.groups;
  const int common = Config::outputs ? 2 * Rows::bytes + kImageBytes : Rows::bytes + kImageBytes - kTriangleBytes;
  const int64_t image_bytes = p.image_bytes;
  const char* image = p.images + (work.first_chunk * p.H + h) * image_bytes;
  Producer<Config::stages> ring(shared.ring);
  int token = static_cast<int>(work.token), step = C;
  int64_t image_step = p.H * image_bytes;
  if constexpr (Config::reverse)
    token += (chunks - 1) * C, image += (chunks - 1) * image_step, step = -step, image_step = -image_step;
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk, token += step, image += image_step, ring.advance()) {
    auto& stage = shared.stage[ring.acquire(common + groups * ValueTile::bytes)];
    Mbarrier& loaded = ring.full();
#pragma unroll
    for (int panel = 0; panel < Rows::panels; ++panel) {
      const int at = panel * Rows::panel_bytes, k = panel * Rows::panel_width;
      tma_load(stage.k + at, maps.k, loaded, CacheHint::evict_normal, k, hk, token, row);
      if constexpr (Config::outputs) tma_load(stage.q + at, maps.q, loaded, CacheHint::evict_normal, k, hk, token, row);
    }
    cp_async_bulk_load(stage.vectors, image + kVectorsAt, kVectors * kVectorBytes, loaded);
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
      if (group < groups)
        tma_load(stage.v[group], maps.v, loaded, CacheHint::evict_first, column + group * kRows, h, token, row);
#pragma unroll
    for (int panel = 0; panel < kBlocks; ++panel) {
      cp_async_bulk_load(stage.t + panel_in_tile(panel), image + panel_in_image(panel), stored_bytes(panel), loaded);
      if constexpr (Config::outputs)
        cp_async_bulk_load(stage.p + panel_in_tile(panel), image + kTriangleBytes + panel_in_image(panel),
                           stored_bytes(panel), loaded);
    }
  }
}

// Zero for the tokens behind the sequence's end, which are the next sequence's.
template <class Config>
__device__ void clear_values(SweepStage<Config>& stage, int count, int thread) {
  constexpr int row_units = ValueTile::row_bytes / 16;
  for (char* tile : stage.v)
    for (int u = count * row_units + thread; u < C * row_units; u += kNormalisers)
      reinterpret_cast<uint4*>(tile)[u] = make_uint4(0, 0, 0, 0);
}

// 8 elements times `factor`.
template <class Element, class Operand>
__device__ uint4 scaled(const uint4& raw, float factor) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  uint32_t out[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const float2 x = unpack<Element>(words[w]);
    out[w] = pack<Operand>(x.x * factor, x.y * factor);
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

// Kn, Qn = rows of K and Q over their norms, in fp16 where the rows were; in reverse (backward/reverse.cuh) Q'' in
// the dtype of q, and K as it is. Rows behind the sequence's end become zero without being read. A thread has one unit
// of 16 bytes in each panel of a row, a few of them at a time, so that their loads wait together.
template <class Config, class Element>
__device__ void normalise_rows(SweepStage<Config>& stage, int count, int thread) {
  constexpr int row_units = Config::Rows::row_bytes / 16, rows = kNormalisers / row_units;
  constexpr int panels = (Config::outputs ? 2 : 1) * Config::Rows::panels, batch = Config::normaliser_batch;
  static_assert(kNormalisers % row_units == 0 && kInverseQ == kInverseK + 1);
  int row = thread / row_units;
  char* at = stage.k + thread * 16;  // q follows k
  for (; row < count; row += rows, at += kNormalisers * 16) {
    const float of_k = stage.vectors[kInverseK][row];
    float of_q = Config::outputs ? stage.vectors[kInverseQ][row] : 0;
    if constexpr (Config::reverse) of_q *= stage.vectors[kOutput][row] * stage.vectors[kReadQ][row];
#pragma unroll
    for (int first = Config::reverse ? Config::Rows::panels : 0; first < panels; first += batch) {
      uint4 raw[batch];
#pragma unroll
      for (int b = 0; b < batch && first + b < panels; ++b)
        raw[b] = *reinterpret_cast<const uint4*>(at + (first + b) * Config::Rows::panel_bytes);
#pragma unroll
      for (int b = 0; b < batch && first + b < panels; ++b)
        *reinterpret_cast<uint4*>(at + (first + b) * Config::Rows::panel_bytes) =
            scaled<Element, typename Config::Operand>(raw[b], first + b < Config::Rows::panels ? of_k : of_q);
    }
  }
#pragma unroll 1
  for (; row < C; row += rows, at += kNormalisers * 16)
#pragma unroll
    for (int panel = 0; panel < panels; ++panel)
      *reinterpret_cast<uint4*>(at + panel * Config::Rows::panel_bytes) = make_uint4(0, 0, 0, 0);
}

// T' - I from T', by the normalisers; the 16 elements of a block lie in different banks.
__device__ inline void clear_diagonal(char* t, int thread) {
  if (thread % 32 >= kBlock) return;
#pragma unroll
  for (int i = thread / 32 * kBlock + thread % 32; i < C; i += kNormalisers / 32 * kBlock)
    *reinterpret_cast<uint16_t*>(t + SquareTile::offset(i, i)) = 0;
}

template <class Config>
__device__ void normalise_chunks(const SweepArguments& p, const SweepWork& work, SweepShared<Config>& shared) {
  const int thread = threadIdx.x - 32;
  PipelineState<Config::stages> at(PhaseParity::first());
  for (int chunk = 0; chunk < work.chunks; ++chunk, at.advance()) {
    auto& stage = shared.stage[at.stage];
    shared.ring.full[at.stage].wait(at.parity);
    const int count = work.count(Config::reverse ? work.chunks - 1 - chunk : chunk);
    if (count < C) clear_values<Config>(stage, count, thread);
    if constexpr (Config::reverse) {
      normalise_rows<Config, typename Config::Operand>(stage, count, thread);
      clear_diagonal(stage.t, thread);
    } else if (p.dtype == Dtype::bf16)
      normalise_rows<Config, bf16>(stage, count, thread);
    else
      normalise_rows<Config, f16>(stage, count, thread);
    if constexpr (Config::pooled)
      if (p.plan.marks != nullptr && thread == 0) shared.mark[at.stage] = p.plan.marks[work.first_chunk + chunk];
    fence_proxy_async();
    shared.normalised[at.stage].arrive();
  }
}

}  // namespace jet::hopper
