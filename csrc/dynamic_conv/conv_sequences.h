// Sequences and their states as the Hopper kernels of the convolution are told of them.
#pragma once

#include <cuda_runtime.h>

#include "csrc/dynamic_conv/conv_inputs.h"
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

// Host: no token at all; every sequence hands its state on.
inline void copy_states(const char* op, const void* in, void* out, size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return;
  check(in == nullptr ? cudaMemsetAsync(out, 0, bytes, stream) : cudaMemcpyAsync(out, in, bytes, cudaMemcpyDeviceToDevice, stream), op);
}

}  // namespace jet::hopper
