// Elements of the tensors that an op's arguments are (csrc/common/tensors.h).
#pragma once

#include "csrc/common/tensors.h"
#include "csrc/cpu/simd.h"

namespace jet::cpu::JET_CPU_ISA {

// Element (b, t, h, 0).
template <class T>
JET_INLINE const T* at(const TokenTensor& x, long b, long t, long h = 0) {
  return static_cast<const T*>(x.data) + b * x.strides.b + t * x.strides.t + h * x.strides.h;
}

// Element c of row r.
template <class T>
JET_INLINE const T* at(const StridedRows& x, long r, long c) {
  return static_cast<const T*>(x.data) + r * x.row + c * x.column;
}

JET_INLINE long index_at(const IndexVector& indices, long i) { return static_cast<const int64_t*>(indices.data)[i]; }

// The row of sequence n, negative if it has none.
template <class Strides>
JET_INLINE long row_of(const Pool<Strides>& pool, long n) {
  return pool.rows.data == nullptr ? n : index_at(pool.rows, n);
}

}  // namespace jet::cpu::JET_CPU_ISA
