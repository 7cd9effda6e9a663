// Where a token stands in its sequence, as the backward kernels of dynamic_conv need it. The first of them writes it to
// the workspace for the last.
#pragma once

#include "csrc/dynamic_conv/gradient.cuh"

namespace jet::hopper {

struct GradientPlace {
  int row;          // of the sequence's states
  int8_t position;  // in the sequence; positions from W - 1 on are alike
  int8_t left;      // tokens of the sequence behind this one; W - 1 and more are alike
  bool outside;     // of all sequences: gradients are zero
};
static_assert(sizeof(GradientPlace) == 8);

template <int W>
__device__ GradientPlace gradient_place(const ConvSequences& s, int64_t m) {
  if (m >= s.tokens) return {.row = 0, .position = W - 1, .left = W - 1, .outside = true};
  const TokenPlace place = place_of_token<W>(s, m);
  if (place.outside) return {.row = 0, .position = W - 1, .left = W - 1, .outside = true};
  const int64_t left = sequence_bound(s, place.row + 1) - 1 - m;
  return {.row = place.row,
          .position = place.position,
          .left = static_cast<int8_t>(left < W - 1 ? left : W - 1),
          .outside = false};
}

// Whatever is read of memory is 8 bytes at once.
__device__ inline GradientPlace load_place(const GradientPlace* from) {
  const uint2 words = *reinterpret_cast<const uint2*>(from);
  return {.row = static_cast<int>(words.x),
          .position = static_cast<int8_t>(words.y & 0xff),
          .left = static_cast<int8_t>(words.y >> 8 & 0xff),
          .outside = (words.y >> 16 & 0xff) != 0};
}
__device__ inline void store_place(GradientPlace* to, const GradientPlace& place) {
  *reinterpret_cast<uint2*>(to) =
      make_uint2(static_cast<uint32_t>(place.row), static_cast<uint32_t>(place.position & 0xff) |
                                                       static_cast<uint32_t>(place.left & 0xff) << 8 |
                                                       static_cast<uint32_t>(place.outside) << 16);
}

// What is special about the 4 tokens of a thread, which are the same in all its tiles. Bit i of each mask is token i.
template <int W>
struct TokenFlags {
  uint32_t begins;        // nothing flows out of it into the token before; bit 4: the token behind the thread's last
  uint32_t first_tokens;  // of a sequence: what would flow out is dconv_state
  uint32_t at_begin;      // its window reaches into conv_state
  uint32_t at_end;        // its input is in conv_state_out
  uint32_t outside;       // of all sequences
  uint32_t own;           // its dz and dx are stored

  __device__ TokenFlags(const GradientPlace* places, int own_tokens)
      : begins(0), first_tokens(0), at_begin(0), at_end(0), outside(0), own((1u << max(min(own_tokens, 4), 0)) - 1) {
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const GradientPlace place = load_place(places + i);
      begins |= static_cast<uint32_t>(place.position == 0 || place.outside) << i;
      if (i == 4) break;
      first_tokens |= static_cast<uint32_t>(place.position == 0 && !place.outside) << i;
      at_begin |= static_cast<uint32_t>(place.position < W - 1 && !place.outside) << i;
      at_end |= static_cast<uint32_t>(place.left < W - 1 && !place.outside) << i;
      outside |= static_cast<uint32_t>(place.outside) << i;
    }
    first_tokens &= own, at_end &= own;
  }
};

// The second word of a place as it lies in memory, and whether that is a token whose window is not in x alone.
__device__ inline uint32_t load_place_flags(const GradientPlace* from) {
  return reinterpret_cast<const uint32_t*>(from)[1];
}
template <int W>
__device__ bool is_special(uint32_t flags) {
  return (flags & 0xff) < W - 1 || (flags >> 16 & 0xff) != 0;
}

// Products of 16-bit pairs, each rounded once.
template <class Element>
__device__ uint32_t multiply_pairs(uint32_t a, uint32_t b);
template <>
__device__ inline uint32_t multiply_pairs<bf16>(uint32_t a, uint32_t b) {
  const __nv_bfloat162 c =
      __hmul2_rn(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&c);
}
template <>
__device__ inline uint32_t multiply_pairs<f16>(uint32_t a, uint32_t b) {
  const __half2 c = __hmul2_rn(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&c);
}

// A quad of lanes has 4 x 4 words, of which lane c holds column c as word[i]; afterwards it holds row c. So a thread
// has 8 consecutive columns of a 16-bit accumulator, of which it had 2 in each of 4 groups of 8.
__device__ inline void transpose_quad(uint32_t (&word)[4]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool high = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      uint32_t& mine = word[i];
      uint32_t& other = word[i | step];
      const uint32_t given = __shfl_xor_sync(0xffffffffu, high ? mine : other, step);
      (high ? mine : other) = given;
    }
  }
}

}  // namespace jet::hopper
