// The forms in which an op's arguments reach the CPU and CUDA code of every family. Data alone: the CPU code, which is
// compiled once per instruction set, has its functions of them in csrc/cpu.
#pragma once

#include <cstdint>

#include "csrc/common/dtype.h"

namespace jet {

// Element strides of tokens [B, T, heads, D]. A dimension that a tensor does not have is 0: the heads of x [B, T, D], D
// of g [B, T, heads], T of a step's x [N, D], whose sequences are b.
struct TokenStrides {
  int64_t b, t, h, d;
};

struct TokenTensor {
  const void* data;
  Dtype dtype;
  TokenStrides strides;
};

// A tensor [.., C] as rows of C elements. It is often a slice of one projection's output, so rows may lie at any
// stride.
struct StridedRows {
  const void* data;
  int64_t row, column;  // strides in elements
};

// Parameters that a few heads or columns share: contiguous numbers in the dtype of the tokens, or wider.
struct NumberVector {
  const void* data;
  Dtype dtype;
};

// Integers that the caller passes: cu_seqlens, state_indices, num_accepted. On a CPU they are int64 and have been
// checked. On a device nobody has looked at them.
struct IndexVector {
  const void* data = nullptr;  // contiguous; null: not given
  IndexType type = IndexType::i64;
};

// A pool of states [P, ..], and which of its rows each sequence n < N has. `Strides` are those of the family's states.
template <class Strides>
struct Pool {
  Dtype dtype;
  int64_t P;
  void* data;
  Strides strides;
  IndexVector rows;  // [N], each row named once; not given: row n. Negative, or on a device P and more: no row
};

}  // namespace jet
