// Conversions between 16-bit elements and fp32 in registers, and loads and stores that convert; device side.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "csrc/common/tensors.h"

namespace jet::hopper {

// cvt.rn.bf16x2.f32, cvt.rn.f16x2.f32: two fp32 rounded to nearest even, the first in the low half.
template <class Element>
__device__ uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<bf16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ inline uint32_t pack<f16>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// The inverse of pack, exact.
template <class Element>
__device__ float2 unpack(uint32_t both);
template <>
__device__ inline float2 unpack<bf16>(uint32_t both) {
  return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
}
template <>
__device__ inline float2 unpack<f16>(uint32_t both) {
  return __half22float2(*reinterpret_cast<const __half2*>(&both));
}

// Element i of an array whose type is known at run time only. For a kernel's small tensors.
__device__ inline float load_as_float(const void* data, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[i];
  if (dtype == Dtype::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
  return __half2float(static_cast<const __half*>(data)[i]);
}
__device__ inline float load_as_float(const StridedRows& x, Dtype dtype, uint32_t row, uint32_t column) {
  return load_as_float(x.data, dtype, row * x.row + column * x.column);
}

// Element i from x, rounded to nearest even.
__device__ inline void store_from_float(void* data, Dtype dtype, int64_t i, float x) {
  if (dtype == Dtype::f32)
    static_cast<float*>(data)[i] = x;
  else
    static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(dtype == Dtype::bf16 ? pack<bf16>(x, 0) : pack<f16>(x, 0));
}

// Elements i .. i + n - 1 from x, rounded to nearest even, 16 bytes at a time where n allows it. i is a multiple of n,
// `data` 16-byte aligned.
template <int n>
__device__ void store_rounded(void* data, Dtype dtype, int64_t i, const float (&x)[n]) {
  static_assert(n == 4 || n == 8);
  if (dtype == Dtype::f32) {
#pragma unroll
    for (int j = 0; j < n; j += 4)
      __stcg(reinterpret_cast<float4*>(static_cast<float*>(data) + i + j),
             make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]));
    return;
  }
  uint32_t words[n / 2];
#pragma unroll
  for (int j = 0; j < n / 2; ++j)
    words[j] = dtype == Dtype::bf16 ? pack<bf16>(x[2 * j], x[2 * j + 1]) : pack<f16>(x[2 * j], x[2 * j + 1]);
  uint16_t* to = static_cast<uint16_t*>(data) + i;
  if constexpr (n == 4)
    __stcg(reinterpret_cast<uint2*>(to), make_uint2(words[0], words[1]));
  else
    __stcg(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
}

// st.shared.v4.f32: one 16-byte store; nvcc splits the assignment of a float4 where it does not see the alignment.
__device__ inline void st_shared_v4(float* to, float a, float b, float c, float d) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}

// Element i of an array of int32 or int64, such as cu_seqlens.
__device__ inline int64_t load_index(const IndexVector& from, int64_t i) {
  return from.type == IndexType::i32 ? static_cast<const int32_t*>(from.data)[i]
                                     : static_cast<const int64_t*>(from.data)[i];
}

}  // namespace jet::hopper
