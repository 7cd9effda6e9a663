// The norms on a GPU: bound by reading and writing each row once. docs/norms.md has the data sheet.
//
// A row is read in units: 16 bytes, or single elements where C is no multiple of 16 bytes. A team of lanes, a part of a
// warp or a whole CTA, holds a row in registers, a few units a lane, and walks over rows; its weights stay in
// registers. The next row is on its way while the sum of squares of this one goes round.
#pragma once

#include "csrc/hopper/convert.h"
#include "csrc/hopper/launch.h"
#include "csrc/hopper/sigmoid.h"
#include "csrc/norm/kernel_takes.h"

namespace jet::hopper {

enum class NormKind { alone, add, gated };

// What forward and backward read.
struct NormArguments {
  uint32_t rows, inner;
  int C, lanes;  // of a team: a power of two up to 32, or the CTA's threads
  float eps;
  NormRows x, other;  // the other: residual or gate
  const void* weight;
  bool wide_weight;  // fp32 beside 16-bit elements
};

// A unit as it is in memory.
template <class Element, int unit>
struct NormUnit {
  static constexpr int words = unit == 1 ? 1 : 4;
  static_assert(unit == 1 || unit * sizeof(Element) == 16);
  uint32_t bits[words] = {};

  __device__ void load(const Element* from) {
    if constexpr (unit > 1) {
      const uint4 four = __ldcg(reinterpret_cast<const uint4*>(from));
      bits[0] = four.x, bits[1] = four.y, bits[2] = four.z, bits[3] = four.w;
    } else if constexpr (sizeof(Element) == 4) {
      bits[0] = __ldcg(reinterpret_cast<const uint32_t*>(from));
    } else {
      bits[0] = __ldcg(reinterpret_cast<const uint16_t*>(from));
    }
  }
  __device__ void store(Element* to) const {
    if constexpr (unit > 1)
      __stcg(reinterpret_cast<uint4*>(to), make_uint4(bits[0], bits[1], bits[2], bits[3]));
    else if constexpr (sizeof(Element) == 4)
      __stcg(reinterpret_cast<uint32_t*>(to), bits[0]);
    else
      __stcg(reinterpret_cast<uint16_t*>(to), static_cast<uint16_t>(bits[0]));
  }
  __device__ void read(float (&x)[unit]) const {
    if constexpr (sizeof(Element) == 4) {
#pragma unroll
      for (int i = 0; i < unit; ++i) x[i] = __uint_as_float(bits[i]);
    } else if constexpr (unit == 1) {
      x[0] = unpack<Element>(bits[0]).x;
    } else {
#pragma unroll
      for (int i = 0; i < words; ++i) {
        const float2 pair = unpack<Element>(bits[i]);
        x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
      }
    }
  }
  // Rounds to nearest even.
  __device__ void write(const float (&x)[unit]) {
    if constexpr (sizeof(Element) == 4) {
#pragma unroll
      for (int i = 0; i < unit; ++i) bits[i] = __float_as_uint(x[i]);
    } else if constexpr (unit == 1) {
      bits[0] = pack<Element>(x[0], 0.0f);
    } else {
#pragma unroll
      for (int i = 0; i < words; ++i) bits[i] = pack<Element>(x[2 * i], x[2 * i + 1]);
    }
  }
};

// A lane's units of a row.
template <class Element, int unit, int units>
using NormRow = NormUnit<Element, unit>[units];

// Element number 0 of a row.
template <class Element>
__device__ const Element* row_of(const NormArguments& p, const NormRows& rows, uint32_t row) {
  const uint32_t outer = p.inner == p.rows ? 0 : row / p.inner;  // in 32 bits: a division of 64 is a long routine
  return static_cast<const Element*>(rows.data) + outer * rows.outer_stride +
         (row - outer * p.inner) * rows.inner_stride;
}

// f(j, c) for each unit j of lane `lane`, which begins at column c.
template <int unit, int units, class F>
__device__ void for_units(const NormArguments& p, int lane, const F& f) {
#pragma unroll
  for (int j = 0; j < units; ++j) {
    const int c = (j * p.lanes + lane) * unit;
    if (c < p.C) f(j, c);
  }
}

template <class Element, int unit, int units>
__device__ void load_row(NormRow<Element, unit, units>& row, const NormArguments& p, const NormRows& rows, uint32_t r,
                         int lane) {
  const Element* from = row_of<Element>(p, rows, r);
  for_units<unit, units>(p, lane, [&](int j, int c) { row[j].load(from + c); });
}

// The weights of the unit that begins at column c.
template <class Element, int unit>
__device__ void load_weight(float (&weight)[unit], const NormArguments& p, int c) {
  if (sizeof(Element) == 2 && p.wide_weight) {
    constexpr int n = unit == 1 ? 1 : 4;
#pragma unroll
    for (int i = 0; i < unit; i += n) {
      NormUnit<float, n> part;
      part.load(static_cast<const float*>(p.weight) + c + i);
#pragma unroll
      for (int k = 0; k < n; ++k) weight[i + k] = __uint_as_float(part.bits[k]);
    }
  } else {
    NormUnit<Element, unit> part;
    part.load(static_cast<const Element*>(p.weight) + c);
    part.read(weight);
  }
}

// The sum over the lanes of a team, in every lane. `partial`: of a team of several warps, one float a warp, not those
// of the call before.
__device__ inline float sum_over_team(float x, int lanes, float* partial) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    if (offset < lanes) x += __shfl_xor_sync(0xffffffffu, x, offset);
  if (lanes <= 32) return x;
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
#pragma unroll 4
  for (int warp = 0; warp < lanes / 32; ++warp) x += partial[warp];
  return x;
}

template <class Element, int unit, int units, NormKind kind>
__global__ void __launch_bounds__(kNormThreads)
    norm_kernel(const __grid_constant__ NormArguments p, void* y_rows, void* sum_rows) {
  using Row = NormRow<Element, unit, units>;
  __shared__ float partial[2][kNormThreads / 32];
  const int lane = static_cast<int>(threadIdx.x) % p.lanes;
  const uint32_t teams = blockDim.x / p.lanes, step = gridDim.x * teams;
  uint32_t row = blockIdx.x * teams + threadIdx.x / p.lanes;
  float weight[units][unit] = {};
  Row x, other;
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  if (row < p.rows) {
    load_row<Element, unit, units>(x, p, p.x, row, lane);
    if constexpr (kind != NormKind::alone) load_row<Element, unit, units>(other, p, p.other, row, lane);
  }
  for_units<unit, units>(p, lane, [&](int j, int c) { load_weight<Element>(weight[j], p, c); });
  // Every thread of a warp goes round as often: shuffles and barriers need them all.
  for (uint32_t first = blockIdx.x * teams, half = 0; first < p.rows; first += step, row += step, half ^= 1) {
    float squares = 0, z[units][unit] = {};
    const int64_t out = int64_t{row} * p.C;
    for_units<unit, units>(p, lane, [&](int j, int c) {
      x[j].read(z[j]);
      if constexpr (kind == NormKind::add) {
        float residual[unit];
        other[j].read(residual);
#pragma unroll
        for (int i = 0; i < unit; ++i) z[j][i] += residual[i];
        NormUnit<Element, unit> sum;
        sum.write(z[j]);
        if (row < p.rows) sum.store(static_cast<Element*>(sum_rows) + out + c);
        sum.read(z[j]);
      }
#pragma unroll
      for (int i = 0; i < unit; ++i) squares = fmaf(z[j][i], z[j][i], squares);
    });
    Row gate;
    if constexpr (kind == NormKind::gated)
#pragma unroll
      for (int j = 0; j < units; ++j) gate[j] = other[j];
    if (row + step < p.rows) {
      load_row<Element, unit, units>(x, p, p.x, row + step, lane);
      if constexpr (kind != NormKind::alone) load_row<Element, unit, units>(other, p, p.other, row + step, lane);
    }
    const float inverse = rsqrtf(sum_over_team(squares, p.lanes, partial[half]) / static_cast<float>(p.C) + p.eps);
    if (row >= p.rows) continue;
    for_units<unit, units>(p, lane, [&](int j, int c) {
#pragma unroll
      for (int i = 0; i < unit; ++i) z[j][i] *= inverse * weight[j][i];
      if constexpr (kind == NormKind::gated) {
        float h[unit];
        gate[j].read(h);
#pragma unroll
        for (int i = 0; i < unit; ++i) z[j][i] *= h[i] * fast_sigmoid(h[i]);
      }
      NormUnit<Element, unit> y;
      y.write(z[j]);
      y.store(static_cast<Element*>(y_rows) + out + c);
    });
  }
}

}  // namespace jet::hopper
