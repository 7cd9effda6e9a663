// What lies where in the workspace of the forward: a chunk's image is what the backward needs of the forward's first stage.
#pragma once

#include "csrc/gated_delta_rule/chunk_image.h"

namespace jet::hopper {

// How sequences are cut (chunk_plan.cuh).
struct ChunkSegments {
  int chunks;     // of a segment, about; 0: nothing is cut
  int most_cuts;  // of all sequences together
};

// So that a call of few heads fills the device once: as long as if all tokens were one sequence. Sequences in cu_seqlens, whose lengths the
// host does not know, are cut if they turn out to be twice as long as that.
inline ChunkSegments choose_segments(const ChunkGatedDeltaRuleParams& p, int64_t slices, bool packed, int multiprocessors) {
  constexpr int64_t shortest = 32;  // 2048 tokens: below, the additional launches cost more than they save
  const int64_t parts = multiprocessors / (p.H * slices), per_row = (p.T + C - 1) / C, all = packed ? p.T / C + p.N : p.B * per_row;
  if (parts < 2) return {0, 0};
  const int64_t chunks = (all + parts - 1) / parts > shortest ? (all + parts - 1) / parts : shortest;
  const int64_t cuts = packed ? all / chunks - 1 : p.B * (per_row / chunks - 1);
  return cuts > 0 ? ChunkSegments{static_cast<int>(chunks), static_cast<int>(cuts)} : ChunkSegments{0, 0};
}

struct ChunkWorkspace {
  int64_t most_chunks;  // of all sequences together; with cu_seqlens the device knows the number
  // Offsets.
  int64_t images;       // [most_chunks, H] of kImageBytes
  int64_t states;       // [most_cuts, H, K, V] fp32: S at a cut
  int64_t transfers;    // [most_cuts, H, K, K] fp32: of the segment before a cut, but for the first: S at its end = transfer S at its begin + ..
  int64_t first_chunk;  // [N + 1] int32, with cu_seqlens
  int64_t first_cut;    // likewise
  int64_t bytes;
};

inline ChunkWorkspace chunk_workspace(const ChunkGatedDeltaRuleParams& p, bool packed, const ChunkSegments& segments) {
  ChunkWorkspace w{};
  const int64_t per_row = (p.T + C - 1) / C, offsets = packed ? (p.N + 1) * 4 : 0;
  w.most_chunks = packed ? p.T / C + p.N : p.B * per_row;  // every sequence but for its last chunk is whole chunks
  w.states = w.most_chunks * p.H * kImageBytes;
  w.transfers = w.states + segments.most_cuts * p.H * p.K * p.V * 4;
  w.first_chunk = w.transfers + segments.most_cuts * p.H * p.K * p.K * 4;
  w.first_cut = w.first_chunk + offsets;
  w.bytes = w.first_cut + offsets;
  return w;
}

}  // namespace jet::hopper
