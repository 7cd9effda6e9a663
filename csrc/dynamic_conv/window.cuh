// The window of W inputs that a token's taps are multiplied with, the states of sequences, the activation: what all
// Hopper kernels of the convolution share. Elements have 16 bits; a thread has P consecutive channels, 4 or 8.
#pragma once

#include "csrc/dynamic_conv/inputs.h"
#include "csrc/hopper/error.h"
#include "csrc/hopper/packed_elements.h"
#include "csrc/hopper/sigmoid.h"

namespace jet::hopper {

// Where the inputs before a sequence's first token are, and where its last ones go: [rows, D, W-1].
struct ConvStates {
  const void* in;  // null: zeros
  void* out;
  int64_t stride;  // of a row, in elements; of both
};

// Which sequence each token m belongs to, m < tokens = B * T.
struct ConvSequences {
  int64_t tokens, T, N;
  IndexVector cu_seqlens;  // not given: sequences of T tokens
  IndexVector rows;        // [N] the state row of each sequence; negative or >= P: none; not given: row n
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
  return s.cu_seqlens.data == nullptr ? n * s.T : load_index(s.cu_seqlens, n);
}

template <int W>
__device__ TokenPlace place_of_token(const ConvSequences& s, int64_t m) {
  int64_t n = 0;
  if (s.cu_seqlens.data == nullptr) {
    // In 32 bits (tokens are fewer than 2^31), as a division of 64 bits is a long routine.
    n = static_cast<uint32_t>(m) / static_cast<uint32_t>(s.T);
  } else {
    int64_t above = s.N + 1;  // the last n with bound(n) <= m is in [n, above)
#pragma unroll 1
    while (above - n > 1) {
      const int64_t middle = (n + above) / 2;
      (sequence_bound(s, middle) <= m ? n : above) = middle;
    }
  }
  if (n >= s.N) return {.row = 0, .position = W - 1, .last = false, .outside = true};
  const int64_t position = m - sequence_bound(s, n);
  const int64_t row = s.rows.data == nullptr ? n : load_index(s.rows, n);
  const bool none = row < 0 || row >= s.P;
  return {.row = none ? 0 : static_cast<int>(row),
          .position = static_cast<int8_t>(position < W - 1 ? position : W - 1),
          .last = m + 1 == sequence_bound(s, n + 1),
          .outside = none};
}

// n elements; element(i) gives number i as the low 16 bits.
template <int n, class F>
__device__ Elements<n> gather(const F& element) {
  Elements<n> x;
#pragma unroll
  for (int j = 0; j < n / 2; ++j) x.words[j] = element(2 * j) | element(2 * j + 1) << 16;
  return x;
}

// Where the state of a sequence lies, from channel d on.
template <int W>
__device__ const void* state_in(const ConvStates& states, const TokenPlace& place, int64_t d) {
  return static_cast<const uint16_t*>(states.in) + place.row * states.stride + d * (W - 1);
}

// The state of P channels from d on, for begin_of_sequence; zeros where there is none.
template <int P, int W>
__device__ Elements<P*(W - 1)> load_state(const ConvStates& states, const TokenPlace& place, int64_t d) {
  if (states.in == nullptr) return {};
  return load_elements<P*(W - 1)>(state_in<W>(states, place, d));
}

// The window of a token whose position is below W - 1: inputs from before the sequence's first token come from its
// state, whatever x held there.
template <int P, int W>
__device__ void begin_of_sequence(Elements<P> (&x)[W], const Elements<P*(W - 1)>& state, int position) {
#pragma unroll
  for (int i = 0; i < W - 1; ++i) {
    const Elements<P> inputs = gather<P>([&](int c) { return state[c * (W - 1) + i]; });  // number i of each channel
#pragma unroll
    for (int w = 0; w < W - 1; ++w)
      if (position + w == i) x[w] = inputs;
  }
}

// Stores the state after a sequence's last token: the window without its oldest input.
template <int P, int W>
__device__ void end_of_sequence(const Elements<P> (&x)[W], const ConvStates& states, const TokenPlace& place,
                                int64_t d) {
  const auto state = gather<P*(W - 1)>([&](int e) {  // channels first
    uint32_t value = 0;
#pragma unroll
    for (int w = 1; w < W; ++w)
      if (e % (W - 1) == w - 1) value = x[w][e / (W - 1)];
    return value;
  });
  store_elements(static_cast<uint16_t*>(states.out) + place.row * states.stride + d * (W - 1), state);
}

// The state after a sequence of no tokens is the one before it. By one warp.
template <int W>
__device__ void copy_state(const ConvStates& states, int64_t n, int64_t D) {
  const auto* from = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(states.in) + n * states.stride);
  auto* to = reinterpret_cast<uint4*>(static_cast<uint16_t*>(states.out) + n * states.stride);
#pragma unroll 1
  for (int64_t i = threadIdx.x % 32; i < D * (W - 1) / 8; i += 32)
    to[i] = states.in == nullptr ? make_uint4(0, 0, 0, 0) : from[i];
}

// The states of all sequences of no tokens, by warp `warp` of `warps`.
template <int W>
__device__ void copy_states_of_empty_sequences(const ConvSequences& sequences, const ConvStates& states, int64_t D,
                                               int64_t warp, int64_t warps) {
  if (sequences.cu_seqlens.data == nullptr) return;
  for (int64_t n = warp; n < sequences.N; n += warps)
    if (sequence_bound(sequences, n) == sequence_bound(sequences, n + 1)) copy_state<W>(states, n, D);
}

// silu(z) or z of P channels, rounded to Element. Without a branch, so that the approximations overlap with what stands
// before and behind.
template <class Element, int P>
__device__ Elements<P> activate(const float (&z)[P], bool silu) {
  float y[P];
#pragma unroll
  for (int c = 0; c < P; ++c) {
    const float sigmoid = fast_sigmoid(z[c]);
    y[c] = z[c] * (silu ? sigmoid : 1.0f);
  }
  Elements<P> packed;
#pragma unroll
  for (int j = 0; j < P / 2; ++j) packed.words[j] = pack<Element>(y[2 * j], y[2 * j + 1]);
  return packed;
}

// ---- Host
// The sequences of a call whose state rows are those of conv_state.
inline ConvSequences sequences_of(const ConvInputs& in) {
  return {.tokens = in.B * in.T, .T = in.T, .N = in.N, .cu_seqlens = in.cu_seqlens, .rows = {}, .P = in.N};
}
inline ConvStates states_of(const ConvInputs& in, void* conv_state_out) {
  return {.in = in.conv_state, .out = conv_state_out, .stride = in.D * (in.W - 1)};
}

// The states of a call without tokens, of outputs or of gradients: `to` [N, D, W-1] is `from`, or zeros if that is
// null. `op` is named in errors.
inline void copy_all_states(const char* op, const ConvInputs& in, const void* from, void* to, cudaStream_t stream) {
  const size_t bytes = in.N * in.D * (in.W - 1) * 2;
  if (bytes == 0) return;
  check(from == nullptr ? cudaMemsetAsync(to, 0, bytes, stream)
                        : cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream),
        op);
}

// Elements from one token to the next, where tokens lie in rows (kernel_takes.h). Of a dimension of size 1 the stride
// means nothing.
inline int64_t row_stride(const ConvInputs& in, const TokenTensor& x) { return in.T == 1 ? x.strides.b : x.strides.t; }

// f(Element(), std::integral_constant<int, W>()) for a call that the kernels take.
template <class F>
void with_element_and_taps(const ConvInputs& in, const F& f) {
  with_taps(in.W, [&](auto taps) { in.x.dtype == Dtype::bf16 ? f(bf16(), taps) : f(f16(), taps); });
}

}  // namespace jet::hopper
