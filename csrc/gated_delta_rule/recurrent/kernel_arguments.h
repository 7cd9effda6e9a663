// What the host hands to the recurrent kernel, and how it cuts the work into CTAs.
#pragma once

#include "csrc/gated_delta_rule/recurrent/kernel_takes.h"

namespace jet::hopper {

// x / d for 0 <= x < 2^31 by a multiplication: the instructions for a divisor that the compiler does not know take a
// hundred cycles each.
struct Divisor {
  uint32_t d = 1, factor = 1u << 31;
  int shift = 31;

  Divisor() = default;
  constexpr explicit Divisor(int64_t divisor) : d(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << (shift - 31)) < d) ++shift;  // 2^shift = 2^31 times the next power of two
    // Rounded up: too large by less than d / 2^shift <= 2^-31.
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + d - 1) / d);
  }
#ifdef __CUDACC__
  __host__ __device__
#endif
      constexpr uint32_t quotient(uint32_t x) const {
    return static_cast<uint32_t>(uint64_t{x} * factor >> shift);
  }
};

namespace proof {
constexpr bool divides(uint32_t d) {
  const uint32_t last = 0x7fffffffu / d * d;  // the largest multiple
  for (const uint32_t x : {0u, 1u, d - 1, d, last - 1, last, 0x7fffffffu})
    if (Divisor(d).quotient(x) != x / d) return false;
  return true;
}
static_assert(divides(1) && divides(2) && divides(3) && divides(7) && divides(12) && divides(255) && divides(641) &&
              divides(65536) && divides(1000003) && divides(0x7ffffffeu) && divides(0x7fffffffu));
}  // namespace proof

constexpr int kMaxTokens = 8;  // prepared at a time in shared memory

// The same tensor with its strides in bytes, as the kernel has them.
inline TokenTensor in_bytes(const TokenTensor& x) {
  const int64_t size = x.dtype == Dtype::f32 ? 4 : 2;
  const TokenStrides& s = x.strides;
  return {x.data, x.dtype, {size * s.b, size * s.t, size * s.h, size * s.d}};
}

struct RecurrentArguments {
  int64_t N, H, Hk;
  int T, K, V;  // T: of 2^31 tokens the keys alone would fill 256 GiB
  float scale;
  bool l2norm_qk;
  TokenTensor q, k, v, g, beta;  // in_bytes. Commit: k and v are the keys and updates of verify; no q, no beta
  StatePool pool;
  void* o;
  Dtype o_dtype;
  float *keys, *updates;  // verify
  // Commit. An IndexVector, which ends in padding, would move what follows, and ptxas then finds another schedule than
  // the one that has been measured.
  const void* num_accepted;
  IndexType num_accepted_type;

  // From the tiles: CTA ((n * H / heads + i) * parts + j) has columns from j * columns on of value heads i * heads .. +
  // heads - 1.
  int tokens;                                // prepared at a time
  int slices;                                // of a CTA
  int columns, heads;                        // of a CTA; whole heads if more than one. Its last columns may be beyond V
  Divisor parts, head_groups, group, width;  // CTAs of a head, H / heads, H / Hk, V
  // A JetBlock's step, whose g and beta are a and b. Last, as what stood here would move the others.
  NumberVector A_log, dt_bias;
};

struct RecurrentTiles {
  int tile;    // columns of a slice
  int slices;  // of a CTA
};

// For N sequences.
inline RecurrentTiles choose_recurrent_tiles(Dtype pool, StateOrder order, int64_t N, int64_t T, int64_t H, int64_t Hk,
                                             int64_t V, int multiprocessors) {
  // Columns of the multiprocessor that has most to do.
  const auto most = [&](int64_t columns) {
    return (N * H * V / columns + multiprocessors - 1) / multiprocessors * columns;
  };
  const int64_t full = 3 * multiprocessors;  // CTAs: enough for one to work while others wait for memory
  // 64: whole 256-byte rows in fp32. States [V, K] have no such rows, and four threads side by side along K where a
  // tile of 64 has two: in fp32 whole sectors.
  int tile = V % 64 == 0 && (order == StateOrder::k_first || pool == Dtype::bf16) ? 64 : 32;
  // While all CTAs run at once, halves spread better: 1, 3, 4, 6 sequences of the 2B model. Below 128-byte rows of fp32
  // nothing is won.
  if (tile == 64 && N * H * (V / 64) < full && most(32) < most(64)) tile = 32;
  // Slices share tokens that are in shared memory at the same time.
  const int64_t per_head = V / tile, per_key_head = H / Hk * per_head;
  if (T > kMaxTokens || V % tile != 0) return {tile, 1};
  const auto ctas = [&](int64_t slices) { return N * H * per_head / slices; };
  int64_t best = 1;
  if (pool == Dtype::bf16) {
    // A slice is half the bytes, so that a CTA's start counts: as much as one and a half slices. Unless that leaves
    // fewer than about two CTAs to a multiprocessor, several slices of a head, or all of a key head, go to one.
    const auto cost = [&](int64_t slices) {
      return (ctas(slices) + multiprocessors - 1) / multiprocessors * (2 * slices + 3);
    };
    const auto consider = [&](int64_t slices) {
      if (slices * tile <= kRecurrentMaxV && 4 * ctas(slices) >= 7 * multiprocessors && cost(slices) <= cost(best))
        best = slices;
    };
    for (int64_t slices = 2; slices <= per_head; ++slices)
      if (per_head % slices == 0) consider(slices);
    consider(per_key_head);
  } else {
    // Inputs that slices have in common are read once if one CTA takes these slices, all those of a key head or of a
    // value head. It may not make the last multiprocessor later by more than a sixteenth.
    for (const int64_t slices : {per_head, per_key_head})
      if (slices * tile <= kRecurrentMaxV && ctas(slices) >= full && 16 * most(slices * tile) <= 17 * most(tile))
        best = slices;
  }
  return {tile, static_cast<int>(best)};
}

}  // namespace jet::hopper
