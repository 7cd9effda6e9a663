// What lies where in the workspace of dynamic_conv_backward, and how its third pass splits the tokens.
#pragma once

#include <algorithm>
#include <cstdint>

#include "csrc/dynamic_conv/prefill/dynamic_conv.h"

namespace jet::hopper {

// N, the columns of R that a CTA of the second or third pass has: at most 256, what a wgmma makes. 64, 192 or 256 at W
// = 4; at W = 2 and 3, which no model has, 128.
//
// Of the third pass: the one that has the fewest columns too many, the larger one where two are alike. R = 384 is 2 x
// 192, 512 is 2 x 256.
inline int weight_gradient_columns(int64_t R, int64_t W) {
  if (W != 4) return 128;
  const auto padded = [&](int n) { return (R + n - 1) / n * n; };
  if (R <= 64) return 64;
  return padded(192) < padded(256) ? 192 : 256;
}

// Of the second pass: the one that takes the least time, where few tokens leave multiprocessors without a CTA. The
// order of a sum does not depend on it.
inline int hidden_gradient_columns(int64_t tokens, int64_t R, int64_t W, int multiprocessors) {
  if (W != 4) return 128;
  constexpr int64_t least_cycles = 840;  // of a tile of 32 channels at N = 64: what it takes to form dtaps
  int best = 0;
  int64_t least = INT64_MAX;
  for (const int n : {256, 192, 64}) {
    const int64_t ctas = (tokens + 255) / 256 * 2 * ((R + n - 1) / n);
    const int64_t waves = (ctas + multiprocessors - 1) / multiprocessors,
                  cost = waves * std::max(8 * int64_t{n}, least_cycles);
    if (cost < least) least = cost, best = n;
  }
  return best;
}

// CTAs of the third pass along the rows of dweight have so many channels (backward_weight.cuh).
inline int weight_gradient_channels(int columns, int64_t W) { return (W == 2 ? 32 : 16) * (columns > 192 ? 2 : 3); }

struct TokenSplit {
  int tiles, per_split, splits;  // of 64 tokens
};

// The split that takes the least time, in units of a CTA's tile (about 0.7 us at 1.7 GHz: 1024 or 1152 cycles of
// products). `ctas`: of one split.
inline TokenSplit choose_token_split(int64_t tokens, int64_t ctas, int64_t weights, int multiprocessors) {
  constexpr double start = 6;           // of a CTA: its pipeline fills, its accumulators leave
  constexpr double reduce_launch = 3;   // 2 us
  constexpr double sums = 8.0 / 2.7e6;  // a split's fp32 sums, written and read at 4 TB/s
  const int tiles = static_cast<int>((tokens + 63) / 64);
  TokenSplit best{.tiles = tiles, .per_split = tiles, .splits = 1};
  double least = 1e30;
  for (int64_t wanted = 1; wanted <= std::min<int64_t>(tiles, 16); ++wanted) {
    const int64_t per_split = (tiles + wanted - 1) / wanted, splits = (tiles + per_split - 1) / per_split;
    const int64_t waves = (ctas * splits + multiprocessors - 1) / multiprocessors;
    double cost = static_cast<double>(waves) * (static_cast<double>(per_split) + start);
    if (splits > 1) cost += reduce_launch + sums * static_cast<double>(splits * weights);
    if (cost >= least) continue;
    least = cost;
    best.per_split = static_cast<int>(per_split), best.splits = static_cast<int>(splits);
  }
  return best;
}

// Offsets in bytes.
struct BackwardWorkspace {
  TokenSplit split;
  int64_t dz;           // [tokens, D]
  int64_t places;       // [tokens] of 8 bytes
  int64_t weight_sums;  // fp32 [splits, D*W, R], where there are several
  int64_t bias_sums;    // fp32 [splits, D*W]
  int64_t bytes;
};

inline BackwardWorkspace backward_workspace(const DynamicConvBackwardParams& p, int multiprocessors) {
  const int64_t tokens = p.in.B * p.in.T, rows = p.in.D * p.in.W, R = p.generator.R;
  const int columns = weight_gradient_columns(R, p.in.W), channels = weight_gradient_channels(columns, p.in.W);
  const int64_t pairs = (p.in.D + 2 * channels - 1) / (2 * channels), parts = (R + columns - 1) / columns;
  BackwardWorkspace w{.split = choose_token_split(tokens, 2 * pairs * parts, rows * R, multiprocessors)};
  const int64_t sums = w.split.splits > 1 ? w.split.splits : 0;
  const auto place = [&](int64_t& at, int64_t bytes) {
    at = w.bytes;
    w.bytes += (bytes + 127) / 128 * 128;
  };
  place(w.dz, tokens * p.in.D * 2);
  place(w.places, tokens * 8);
  place(w.weight_sums, sums * rows * R * 4);
  place(w.bias_sums, sums * rows * 4);
  return w;
}

}  // namespace jet::hopper
