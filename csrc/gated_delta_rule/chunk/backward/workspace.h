// What lies where in the workspace of the backward: that of the forward, its images larger, and behind it what the
// passes of the backward leave for each other.
#pragma once

#include "csrc/gated_delta_rule/chunk/workspace.h"

namespace jet::hopper {

struct BackwardWorkspace {
  ChunkWorkspace forward;
  // Offsets.
  int64_t transposed_transfers;  // [most_cuts, H, K, K] fp32
  int64_t cut_gradients;         // [most_cuts, H, K, V] fp32: dS at a cut
  int64_t states;                // [most_chunks, H, V / 64, K, 64]: S0 of a chunk
  int64_t state_gradients;       // likewise dS behind it
  int64_t updates;               // [most_chunks, H, V / 64, C, 64]: U'
  int64_t accumulators;          // of the CTAs of `gradients`
  int64_t bytes;
};

// `accumulators`: bytes
inline BackwardWorkspace backward_workspace(const ChunkGatedDeltaRuleParams& p, const ChunkSegments& segments,
                                            int64_t accumulators) {
  const GatedDeltaRuleInputs& in = p.in;
  BackwardWorkspace w{.forward = chunk_workspace(p, segments, kBackwardImageBytes)};
  const auto aligned = [](int64_t bytes) { return (bytes + 127) / 128 * 128; };
  const int64_t cuts = segments.most_cuts * in.H, tiles = w.forward.most_chunks * in.H * value_tiles(in.V);
  const int64_t states = tiles * in.K * kValueTile * 2;
  w.transposed_transfers = aligned(w.forward.bytes);
  w.cut_gradients = w.transposed_transfers + aligned(cuts * in.K * in.K * 4);
  w.states = w.cut_gradients + aligned(cuts * in.K * in.V * 4);
  w.state_gradients = w.states + states;
  w.updates = w.state_gradients + states;
  w.accumulators = w.updates + tiles * C * kValueTile * 2;
  w.bytes = w.accumulators + accumulators;
  return w;
}

}  // namespace jet::hopper
