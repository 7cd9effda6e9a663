// Which sequence has which tokens and chunks. With cu_seqlens (varlen) only the device knows: the host launches for as
// many chunks as there can be.
#pragma once

#include "csrc/gated_delta_rule/chunk/image.h"
#include "csrc/gated_delta_rule/chunk/prefill_gated_delta_rule.h"
#include "csrc/hopper/convert.h"

namespace jet::hopper {

// In the text of errors.
constexpr const char *kChunkOp = "chunk_gated_delta_rule", *kChunkBackwardOp = "chunk_gated_delta_rule_backward";

struct ChunkPlan {
  int64_t T, N;
  IndexVector cu_seqlens;  // [N + 1]; null: N rows of T tokens
  int* first_chunk;        // [N + 1] in the workspace, written by chunk_plan_kernel; null without cu_seqlens
  int* first_cut;          // likewise
  int64_t most_chunks;     // of all sequences together
  int most_cuts;           // likewise
  int segment_chunks;  // with cu_seqlens: sequences of at least twice as many are cut into segments of about as many;
                       // 0: none is
  int row_chunks;      // of each row of T tokens
  int row_segments;    // likewise
  // Of a prefill with marks: [most_chunks] in the workspace, the row of the pool that the state behind a chunk goes to,
  // or -1. Written by chunk_plan_kernel.
  int* marks = nullptr;
};

// A sequence: tokens begin .. begin + length - 1 of batch row `row`, chunks first_chunk .. first_chunk + chunks - 1 of
// all. Its cuts, one fewer than its segments, are first_cut .. of all.
struct Sequence {
  int64_t row, begin, length, first_chunk;
  int chunks, segments, first_cut;
};

JET_HOST_DEVICE constexpr int64_t chunks_of(int64_t tokens) { return (tokens + C - 1) / C; }
JET_HOST_DEVICE constexpr int segments_of(int64_t chunks, int segment_chunks) {
  return segment_chunks > 0 && chunks >= 2 * segment_chunks ? static_cast<int>(chunks / segment_chunks) : 1;
}
// The chunk of a sequence at which segment s of `segments` begins.
JET_HOST_DEVICE constexpr int segment_begin(int64_t chunks, int segments, int64_t s) {
  return static_cast<int>(chunks * s / segments);
}

// Of numbers below 2^32: a 64-bit division takes four times as long.
__device__ inline uint32_t quotient(int64_t a, int64_t b) {
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// Offsets outside 0..T, which the contract forbids and a device cannot report, must not become addresses.
__device__ inline int64_t offset_of(const ChunkPlan& plan, int64_t n) {
  return min(max(load_index(plan.cu_seqlens, n), int64_t{0}), plan.T);
}

__device__ inline Sequence sequence_of(const ChunkPlan& plan, int64_t n) {
  if (plan.cu_seqlens.data == nullptr) {
    return {.row = n,
            .begin = 0,
            .length = plan.T,
            .first_chunk = n * plan.row_chunks,
            .chunks = plan.row_chunks,
            .segments = plan.row_segments,
            .first_cut = static_cast<int>(n) * (plan.row_segments - 1)};
  }
  const int64_t begin = offset_of(plan, n), end = offset_of(plan, n + 1);
  const int first = plan.first_chunk[n], cut = plan.first_cut[n];
  return {.row = 0,
          .begin = begin,
          .length = max(end - begin, int64_t{0}),
          .first_chunk = first,
          .chunks = plan.first_chunk[n + 1] - first,
          .segments = plan.first_cut[n + 1] - cut + 1,
          .first_cut = cut};
}

// The last n < N with first(n) <= i; first(0) = 0.
template <class First>
__device__ int64_t last_at_most(int64_t N, int64_t i, const First& first) {
  int64_t low = 0, high = N;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first(middle) <= i ? low : high) = middle;
  }
  return low;
}

// The sequence of a chunk; -1 if there are fewer chunks.
__device__ inline int64_t sequence_of_chunk(const ChunkPlan& plan, int64_t chunk) {
  if (plan.cu_seqlens.data == nullptr) return quotient(chunk, plan.row_chunks);
  if (chunk >= plan.first_chunk[plan.N]) return -1;
  return last_at_most(plan.N, chunk, [&](int64_t n) { return plan.first_chunk[n]; });
}

// The sequence whose segments a cut separates; -1 if there are fewer cuts.
__device__ inline int64_t sequence_of_cut(const ChunkPlan& plan, int64_t cut) {
  if (plan.cu_seqlens.data == nullptr) return quotient(cut, plan.row_segments - 1);
  if (cut >= plan.first_cut[plan.N]) return -1;
  return last_at_most(plan.N, cut, [&](int64_t n) { return plan.first_cut[n]; });
}

// The sequence of a segment, counted over all sequences, each of which has its cuts and one more; -1 if there are
// fewer.
__device__ inline int64_t sequence_of_segment(const ChunkPlan& plan, int64_t segment) {
  if (plan.cu_seqlens.data == nullptr) return quotient(segment, plan.row_segments);
  if (segment >= plan.N + plan.first_cut[plan.N]) return -1;
  return last_at_most(plan.N, segment, [&](int64_t n) { return n + plan.first_cut[n]; });
}

// The row of sequence n, negative if it has none.
__device__ inline int64_t row_of(const StatePool& pool, int64_t n) {
  const int64_t row = pool.rows.data == nullptr ? n : load_index(pool.rows, n);
  return row < pool.P ? row : -1;
}

// Where a sequence of a prefill begins: at its row of the pool, or, negative, at zeros.
__device__ inline int64_t initial_row(const PrefillStates& states, int64_t n) {
  return states.has_initial_state == nullptr || states.has_initial_state[n] ? row_of(states.pool, n) : -1;
}

// Of join.cuh.
struct JoinArguments {
  ChunkPlan plan;
  int64_t H, V;
  float* states;           // [cuts, H, K, V]
  const float* transfers;  // [cuts, H, K, K]
  // From the last cut to the first, for gradients of states: what a cut has is of the segment behind it, and
  // `transfers` are transposed.
  bool reverse = false;
};

}  // namespace jet::hopper
