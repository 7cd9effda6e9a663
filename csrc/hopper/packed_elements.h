// Several 16-bit elements in registers; device side.
#pragma once

#include <cstdint>

#include "csrc/hopper/convert.h"

namespace jet::hopper {

// n elements in registers, loaded and stored 16 bytes at a time where n is a multiple of 8, else 8 bytes. Indices are
// constants after unrolling.
template <int n>
struct Elements {
  uint32_t words[n / 2];
  __device__ uint32_t operator[](int i) const { return i % 2 == 0 ? words[i / 2] & 0xffff : words[i / 2] >> 16; }
};

template <int n>
__device__ Elements<n> load_elements(const void* from) {
  Elements<n> x;
  if constexpr (n % 8 == 0) {
#pragma unroll
    for (int i = 0; i < n / 8; ++i) {
      const uint4 eight = static_cast<const uint4*>(from)[i];
      x.words[4 * i] = eight.x, x.words[4 * i + 1] = eight.y, x.words[4 * i + 2] = eight.z,
                  x.words[4 * i + 3] = eight.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < n / 4; ++i) {
      const uint2 four = static_cast<const uint2*>(from)[i];
      x.words[2 * i] = four.x, x.words[2 * i + 1] = four.y;
    }
  }
  return x;
}

template <int n>
__device__ void store_elements(void* to, const Elements<n>& x) {
  if constexpr (n % 8 == 0) {
#pragma unroll
    for (int i = 0; i < n / 8; ++i)
      __stcg(static_cast<uint4*>(to) + i,
             make_uint4(x.words[4 * i], x.words[4 * i + 1], x.words[4 * i + 2], x.words[4 * i + 3]));
  } else {
#pragma unroll
    for (int i = 0; i < n / 4; ++i) __stcg(static_cast<uint2*>(to) + i, make_uint2(x.words[2 * i], x.words[2 * i + 1]));
  }
}

// n elements as fp32.
template <class Element, int n>
__device__ void unpack_elements(float (&x)[n], const Elements<n>& from) {
#pragma unroll
  for (int j = 0; j < n / 2; ++j) {
    const float2 pair = unpack<Element>(from.words[j]);
    x[2 * j] = pair.x, x[2 * j + 1] = pair.y;
  }
}

}  // namespace jet::hopper
