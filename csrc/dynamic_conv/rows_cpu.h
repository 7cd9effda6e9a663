// Where the inputs of each token are: what the forward and backward loops share.
#pragma once

#include "csrc/cpu/activations.h"
#include "csrc/cpu/elements.h"
#include "csrc/cpu/tasks.h"
#include "csrc/cpu/tensor_access.h"
#include "csrc/dynamic_conv/inputs.h"

namespace jet::cpu::JET_CPU_ISA {

struct Row {  // of token b * T + t
  int64_t sequence;
  int64_t position;  // in its sequence
};

inline int64_t sequence_begin(const ConvInputs& in, int64_t n) {
  return in.cu_seqlens.data ? index_at(in.cu_seqlens, n) : n * in.T;
}
inline int64_t sequence_length(const ConvInputs& in, int64_t n) {
  return in.cu_seqlens.data ? sequence_begin(in, n + 1) - sequence_begin(in, n) : in.T;
}

inline void fill_rows(const ConvInputs& in, Row* rows) {
  for (int64_t n = 0; n < in.N; ++n) {
    const int64_t begin = sequence_begin(in, n), length = sequence_length(in, n);
    for (int64_t p = 0; p < length; ++p) rows[begin + p] = {n, p};
  }
}

// Channel 0 of token number `token`, which is `row`, in x or a tensor of its shape.
template <class T>
JET_INLINE const T* token_at(const TokenTensor& x, const ConvInputs& in, const Row& row, int64_t token) {
  return in.cu_seqlens.data ? at<T>(x, 0, token) : at<T>(x, row.sequence, row.position);
}

// input(n, position - (W-1) + w) of channels [d0, d0 + n)
template <class T, int W>
JET_INLINE Vector<Arithmetic<T>> tap_input(const ConvInputs& in, const Row& row, int64_t token, int w, long d0,
                                           long n) {
  const int64_t p = row.position - (W - 1) + w;
  if (p >= 0)
    return load_some(token_at<T>(in.x, in, row, token) - (W - 1 - w) * in.x.strides.t + d0 * in.x.strides.d,
                     in.x.strides.d, n);
  if (!in.conv_state) return Vector<Arithmetic<T>>{};
  return load_some(static_cast<const T*>(in.conv_state) + (row.sequence * in.D + d0) * (W - 1) + p + W - 1, W - 1, n);
}

// Whether tokens [token, token + M) exist, are of one sequence, and have all their inputs in it.
template <int W>
JET_INLINE bool is_interior(const Row* rows, int64_t token, int64_t M, int64_t end) {
  return token + M <= end && rows[token].position >= W - 1 && rows[token + M - 1].sequence == rows[token].sequence;
}

// conv_state_out[n, :, j] = input(n, length - (W-1) + j)
template <class T>
void write_conv_state(const ConvInputs& in, int64_t n, T* conv_state_out) {
  const long K = in.W - 1;
  const int64_t length = sequence_length(in, n);
  const Row start{n, 0};
  const T* x = token_at<T>(in.x, in, start, sequence_begin(in, n));
  for (long j = 0; j < K; ++j) {
    const int64_t p = length - K + j;
    T* out = conv_state_out + n * in.D * K + j;
    const T* old = static_cast<const T*>(in.conv_state) + n * in.D * K + p + K;
    for (long d = 0; d < in.D; ++d)
      out[d * K] = p >= 0 ? x[p * in.x.strides.t + d * in.x.strides.d] : in.conv_state ? old[d * K] : T{};
  }
}

}  // namespace jet::cpu::JET_CPU_ISA
