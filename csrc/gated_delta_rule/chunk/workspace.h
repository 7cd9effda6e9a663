// What lies where in the workspace of the forward.
#pragma once

#include <algorithm>

#include "csrc/gated_delta_rule/chunk/image.h"

namespace jet::hopper {

// How sequences are cut (plan.cuh).
struct ChunkSegments {
  int of_row;     // rows of T tokens: segments of each
  int chunks;     // with cu_seqlens: of a segment, about; 0: nothing is cut
  int most_cuts;  // of all sequences together
};

// Expected time of a call whose rows, `chunks` long, are cut into `segments` each, in units of a chunk of the pass with
// outputs (2900 cycles at K = 128). `heads`: rows times value heads; slices: CTAs of a segment and head, of V and of
// the transfer matrix.
struct SegmentCosts {
  int64_t multiprocessors, heads, slices, transfer_slices;

  double of(int64_t chunks, int64_t segments) const {
    constexpr double wave = 3;          // a CTA's start, and the loads and stores of its state
    constexpr double no_outputs = 0.6;  // a chunk without q, P' and o
    constexpr double cut = 1.5;         // a step of join
    constexpr double launches = 4;      // two more
    const auto waves = [&](int64_t ctas) {
      return static_cast<double>((ctas + multiprocessors - 1) / multiprocessors);
    };
    const double segment = static_cast<double>((chunks + segments - 1) / segments) + wave;
    const double outputs = waves(heads * segments * slices) * segment;
    if (segments == 1) return outputs;
    // The first segment starts from the true state and has no transfer matrix, the last one has no cut behind it.
    const double effects =
        waves(heads * ((segments - 1) * slices + (segments - 2) * transfer_slices)) * segment * no_outputs;
    return outputs + effects + static_cast<double>(segments - 2) * cut + launches;
  }
};

constexpr int64_t kShortestSegment = 16, kMostSegments = 64;  // chunks; of a row
// Of the time without cuts: a forecast has errors, and cuts cost work that a busy device could do.
constexpr double kWorthCutting = 0.8;

// With cu_seqlens, whose lengths the host does not know, as if all tokens were one sequence: sequences are cut if they
// turn out to be twice as long as its segments.
inline ChunkSegments choose_segments(const ChunkGatedDeltaRuleParams& p, int64_t slices, int64_t transfer_slices,
                                     int multiprocessors) {
  const GatedDeltaRuleInputs& in = p.in;
  const bool packed = p.cu_seqlens.data != nullptr;
  const int64_t rows = packed ? 1 : in.B, chunks = (in.T + C - 1) / C;
  const SegmentCosts costs{
      .multiprocessors = multiprocessors, .heads = rows * in.H, .slices = slices, .transfer_slices = transfer_slices};
  int64_t best = 1;
  for (int64_t parts = 2; parts <= std::min(kMostSegments, chunks / kShortestSegment); ++parts) {
    const int64_t segments = chunks / (chunks / parts);  // as many as the device makes of one sequence and this length
    if (costs.of(chunks, segments) < costs.of(chunks, best)) best = segments;
  }
  if (costs.of(chunks, best) > kWorthCutting * costs.of(chunks, 1)) return {.of_row = 1, .chunks = 0, .most_cuts = 0};
  const int64_t length = chunks / best, most_chunks = in.T / C + p.N;
  return {.of_row = static_cast<int>(best),
          .chunks = static_cast<int>(length),
          .most_cuts = static_cast<int>(packed ? most_chunks / length - 1 : in.B * (best - 1))};
}

struct ChunkWorkspace {
  int64_t most_chunks;  // of all sequences together; with cu_seqlens the device knows the number
  // Offsets.
  int64_t images;       // [most_chunks, H]
  int64_t states;       // [most_cuts, H, K, V] fp32: S at a cut
  int64_t transfers;    // [most_cuts, H, K, K] fp32: of the segment before a cut, but for the first segment
  int64_t first_chunk;  // [N + 1] int32, with cu_seqlens
  int64_t first_cut;    // likewise
  int64_t bytes;
};

inline ChunkWorkspace chunk_workspace(const ChunkGatedDeltaRuleParams& p, const ChunkSegments& segments,
                                      int64_t image_bytes = kImageBytes) {
  const GatedDeltaRuleInputs& in = p.in;
  const bool packed = p.cu_seqlens.data != nullptr;
  ChunkWorkspace w{};
  const int64_t per_row = (in.T + C - 1) / C, offsets = packed ? (p.N + 1) * 4 : 0;
  w.most_chunks = packed ? in.T / C + p.N : in.B * per_row;  // every sequence but for its last chunk is whole chunks
  w.states = w.most_chunks * in.H * image_bytes;
  w.transfers = w.states + segments.most_cuts * in.H * in.K * in.V * 4;
  w.first_chunk = w.transfers + segments.most_cuts * in.H * in.K * in.K * 4;
  w.first_cut = w.first_chunk + offsets;
  w.bytes = w.first_cut + offsets;
  return w;
}

}  // namespace jet::hopper
