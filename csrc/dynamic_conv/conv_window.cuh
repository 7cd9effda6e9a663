// The inputs that a token's kernel meets, 8 channels at a time, and the state of a sequence: what the Hopper kernels of the
// convolution share. Elements are 16 bits; 8 of them lie in a uint4.
#pragma once

#include "csrc/dynamic_conv/conv_inputs.h"
#include "csrc/hopper/convert.h"
#include "csrc/hopper/error.h"

namespace jet::hopper {

// Where the inputs before a sequence's first token are, and where its last ones go: [rows, D, W-1].
struct ConvStates {
  const void* in;  // null: zeros
  void* out;
  int64_t stride;  // of a row, elements: of both
};

// Which sequence each token m belongs to, m < B * T.
struct ConvSequences {
  int64_t tokens, T, N;
  const void* cu_seqlens;  // null: sequences of T tokens
  IndexType cu_seqlens_dtype;
  const void* rows;  // [N] the state row of each sequence; negative or >= P: none; null: row n
  IndexType rows_dtype;
  int64_t P;
};

// Token m: its position in its sequence (positions from W - 1 on are alike), and the state row of the sequence.
struct TokenPlace {
  int row;
  int8_t position;
  bool last;     // of its sequence
  bool outside;  // of all sequences, or its sequence has no row: y is zero and no state is touched
};

__device__ inline int64_t sequence_bound(const ConvSequences& s, int64_t n) {
  return s.cu_seqlens == nullptr ? n * s.T : load_index(s.cu_seqlens, s.cu_seqlens_dtype, n);
}

template <int W>
__device__ TokenPlace place_of_token(const ConvSequences& s, int64_t m) {
  int64_t n = 0;
  if (s.cu_seqlens == nullptr) {
    n = m / s.T;
  } else {
    int64_t above = s.N + 1;  // the last n with bound(n) <= m is in [n, above)
    while (above - n > 1) {
      const int64_t middle = (n + above) / 2;
      (sequence_bound(s, middle) <= m ? n : above) = middle;
    }
  }
  if (n >= s.N) return {0, W - 1, false, true};
  const int64_t position = m - sequence_bound(s, n);
  const int64_t row = s.rows == nullptr ? n : load_index(s.rows, s.rows_dtype, n);
  const bool none = row < 0 || row >= s.P;
  return {none ? 0 : static_cast<int>(row), static_cast<int8_t>(position < W - 1 ? position : W - 1), m + 1 == sequence_bound(s, n + 1), none};
}

// Element i of 8 n elements in registers; i is a constant after unrolling.
template <int n>
__device__ uint32_t element(const uint4 (&x)[n], int i) {
  const uint4& four = x[i / 8];
  const uint32_t word = i / 2 % 4 == 0 ? four.x : i / 2 % 4 == 1 ? four.y : i / 2 % 4 == 2 ? four.z : four.w;
  return i % 2 == 0 ? word & 0xffff : word >> 16;
}

// 8 elements, element(c) giving number c as the low 16 bits.
template <class F>
__device__ uint4 gather_8(const F& element) {
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) words[j] = element(2 * j) | element(2 * j + 1) << 16;
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// x[w] of a token whose position is below W - 1: where the sequence had not begun, inputs come from its state.
template <int W>
__device__ void begin_of_sequence(uint4 (&x)[W], const ConvStates& states, const TokenPlace& place, int64_t d) {
  uint4 state[W - 1] = {};
  if (states.in != nullptr) {
    const auto* from = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(states.in) + place.row * states.stride + d * (W - 1));
#pragma unroll
    for (int i = 0; i < W - 1; ++i) state[i] = from[i];
  }
#pragma unroll
  for (int i = 0; i < W - 1; ++i) {
    const uint4 inputs = gather_8([&](int c) { return element(state, c * (W - 1) + i); });  // number i of each channel
#pragma unroll
    for (int w = 0; w < W - 1; ++w)
      if (place.position + w == i) x[w] = inputs;
  }
}

// The state after a sequence's last token: its window without the oldest input.
template <int W>
__device__ void end_of_sequence(const uint4 (&x)[W], const ConvStates& states, const TokenPlace& place, int64_t d) {
  auto* to = reinterpret_cast<uint4*>(static_cast<uint16_t*>(states.out) + place.row * states.stride + d * (W - 1));
#pragma unroll
  for (int i = 0; i < W - 1; ++i)
    __stcg(to + i, gather_8([&](int c) {
             const int e = 8 * i + c;  // of the 8 (W - 1) elements, channels first
             uint32_t value = 0;
#pragma unroll
             for (int w = 1; w < W; ++w)
               if (e % (W - 1) == w - 1) value = element(x, 8 * w + e / (W - 1));
             return value;
           }));
}

// A sequence of no tokens hands its state on. By one warp.
template <int W>
__device__ void pass_state_on(const ConvStates& states, int64_t n, int64_t D) {
  const auto* from = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(states.in) + n * states.stride);
  auto* to = reinterpret_cast<uint4*>(static_cast<uint16_t*>(states.out) + n * states.stride);
  for (int64_t i = threadIdx.x % 32; i < D * (W - 1) / 8; i += 32) to[i] = states.in == nullptr ? make_uint4(0, 0, 0, 0) : from[i];
}

// z / (1 + e^-z), with the hardware's approximations of exp and of division: relative error about 1e-6
__device__ inline float fast_silu(float z) { return __fdividef(z, 1.0f + __expf(-z)); }

// act(z) of 8 channels, rounded
template <class Element>
__device__ uint4 activate_8(const float (&z)[8], bool silu) {
  float y[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) y[c] = silu ? fast_silu(z[c]) : z[c];
  return make_uint4(pack<Element>(y[0], y[1]), pack<Element>(y[2], y[3]), pack<Element>(y[4], y[5]), pack<Element>(y[6], y[7]));
}

// 8 elements as fp32
template <class Element>
__device__ void unpack_8(float (&x)[8], const uint4& from) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 pair = unpack<Element>(words[j]);
    x[2 * j] = pair.x, x[2 * j + 1] = pair.y;
  }
}

// Host: no token at all; every sequence hands its state on.
inline void copy_states(const char* op, const void* in, void* out, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return;
  check(in == nullptr ? cudaMemsetAsync(out, 0, bytes, stream) : cudaMemcpyAsync(out, in, bytes, cudaMemcpyDeviceToDevice, stream), op);
}

}  // namespace jet::hopper
