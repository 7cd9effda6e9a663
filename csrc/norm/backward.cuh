// The backward of the norms on a GPU: as in kernel.cuh a team of lanes holds a row in registers and walks over rows,
// and the next row is on its way while the two sums of this one go round. A lane adds up dweight of its columns over
// the rows of its team; a CTA's teams add up theirs at the end, and the CTAs' sums are a row each of a workspace.
#pragma once

#include "csrc/hopper/barrier.h"
#include "csrc/norm/kernel.cuh"

namespace jet::hopper {

struct NormGradients {
  const void *grad_y, *grad_sum;  // [rows, C] contiguous, 16-byte aligned; grad_sum may be null: zeros
  void *dx, *dresidual, *dgate;   // [rows, C] contiguous; what the kind has
  float* partial_dweight;         // [CTAs, C]
};

// Whether a thread holds its units of a row, of the next row and of the weight. 16 single elements of each tensor do
// not fit: they are read twice, the second time from the second cache.
constexpr bool holds_rows(int unit) { return unit > 1; }

// Element number 0 of a row of all that the backward reads.
template <class Element>
struct NormBackwardRow {
  const Element *x, *other, *grad_y, *grad_sum;  // other, grad_sum: what the kind has, or null

  template <NormKind kind>
  __device__ static NormBackwardRow of(const NormArguments& p, const NormGradients& g, uint32_t row) {
    const int64_t at = int64_t{row} * p.C;
    const bool has_grad_sum = kind == NormKind::add && g.grad_sum != nullptr;
    return {.x = row_of<Element>(p, p.x, row),
            .other = kind == NormKind::alone ? nullptr : row_of<Element>(p, p.other, row),
            .grad_y = static_cast<const Element*>(g.grad_y) + at,
            .grad_sum = has_grad_sum ? static_cast<const Element*>(g.grad_sum) + at : nullptr};
  }
};

// A unit of these.
template <class Element, int unit, NormKind kind>
struct NormBackwardUnit {
  NormUnit<Element, unit> x, other, grad_y, grad_sum;

  __device__ void load(const NormBackwardRow<Element>& from, int c) {
    x.load(from.x + c);
    if constexpr (kind != NormKind::alone) other.load(from.other + c);
    grad_y.load(from.grad_y + c);
    if (kind == NormKind::add && from.grad_sum != nullptr) grad_sum.load(from.grad_sum + c);
  }

  // add: sum = x + residual, rounded, in the place of x.
  __device__ void prepare() {
    if constexpr (kind == NormKind::add) {
      float sum[unit], residual[unit];
      x.read(sum);
      other.read(residual);
#pragma unroll
      for (int i = 0; i < unit; ++i) sum[i] += residual[i];
      x.write(sum);
    }
  }

  // f(i, z, dy, activated, slope) of each element i: z = x or sum, activated = silu(gate) or 1, slope = silu'(gate).
  template <class F>
  __device__ void for_elements(const F& f) const {
    float z[unit], dy[unit], gate[unit];
    x.read(z);
    grad_y.read(dy);
    if constexpr (kind == NormKind::gated) other.read(gate);
#pragma unroll
    for (int i = 0; i < unit; ++i) {
      float activated = 1, slope = 0;
      if constexpr (kind == NormKind::gated) {
        const float s = fast_sigmoid(gate[i]);
        activated = gate[i] * s, slope = s * (1 + gate[i] * (1 - s));
      }
      f(i, z[i], dy[i], activated, slope);
    }
  }
};

// The sums over the lanes of team number `team`, in every lane. `partial`: of the team's warps, not those of the call
// before.
__device__ inline float2 sums_over_team(float2 x, int lanes, int team, float2* partial) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    if (offset < lanes) {
      x.x += __shfl_xor_sync(0xffffffffu, x.x, offset);
      x.y += __shfl_xor_sync(0xffffffffu, x.y, offset);
    }
  if (lanes <= 32) return x;
  const int lane = static_cast<int>(threadIdx.x) - team * lanes;
  if (lane % 32 == 0) partial[lane / 32] = x;
  named_barrier_sync(1 + team, lanes);  // teams of two warps and more: at most 8 in a CTA
  x = {0, 0};
#pragma unroll 4
  for (int warp = 0; warp < lanes / 32; ++warp) x.x += partial[warp].x, x.y += partial[warp].y;
  return x;
}

// Writes a unit of dx, dresidual and dgate, at element number `at`, and adds its terms to dweight. r = r(z), projection
// = mean_c(u r z).
template <class Element, int unit, NormKind kind>
__device__ void finish_unit(const NormBackwardUnit<Element, unit, kind>& now, const NormGradients& g, int64_t at,
                            float r, float projection, const float (&weight)[unit], float (&dweight)[unit]) {
  float dz[unit], dgate[unit];
  now.for_elements([&](int i, float z, float dy, float activated, float slope) {
    const float normed = z * r;
    dz[i] = r * (dy * weight[i] * activated - projection * normed);
    dgate[i] = dy * weight[i] * normed * slope;
    dweight[i] = fmaf(dy * activated, normed, dweight[i]);
  });
  if (kind == NormKind::add && g.grad_sum != nullptr) {
    float more[unit];
    now.grad_sum.read(more);
#pragma unroll
    for (int i = 0; i < unit; ++i) dz[i] += more[i];
  }
  NormUnit<Element, unit> out;
  out.write(dz);
  out.store(static_cast<Element*>(g.dx) + at);
  if constexpr (kind == NormKind::add) out.store(static_cast<Element*>(g.dresidual) + at);
  if constexpr (kind == NormKind::gated) {
    out.write(dgate);
    out.store(static_cast<Element*>(g.dgate) + at);
  }
}

// to[c] = the sum over the CTA's teams of dweight: of a warp's teams by shuffles, then part after part. `shared` has
// room for the units of all lanes.
template <int unit, int units>
__device__ void sum_over_teams(float (&dweight)[units][unit], const NormArguments& p, int lane, float* shared,
                               float* to) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    if (offset >= p.lanes)
#pragma unroll
      for (int j = 0; j < units; ++j)
#pragma unroll
        for (int i = 0; i < unit; ++i) dweight[j][i] += __shfl_xor_sync(0xffffffffu, dweight[j][i], offset);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lanes_of_part = p.lanes < 32 ? 32 : p.lanes, parts = threads / lanes_of_part;
  if (thread % lanes_of_part < p.lanes) {
    float* mine = shared + thread / lanes_of_part * p.C;  // of [parts, C]
    for_units<unit, units>(p, lane, [&](int j, int c) {
      if constexpr (unit == 1)
        mine[c] = dweight[j][0];
      else
#pragma unroll
        for (int i = 0; i < unit; i += 4)
          st_shared_v4(mine + c + i, dweight[j][i], dweight[j][i + 1], dweight[j][i + 2], dweight[j][i + 3]);
    });
  }
  __syncthreads();
  for (int c = thread; c < p.C; c += threads) {
    float sum = 0;
#pragma unroll 4
    for (int part = 0; part < parts; ++part) sum += shared[part * p.C + c];
    to[c] = sum;
  }
}

// One CTA a multiprocessor is asked for by name: ptxas would rather spill than use more than the registers of two.
template <class Element, int unit, int units, NormKind kind>
__global__ void __launch_bounds__(kNormBackwardThreads, 1)
    norm_backward_kernel(const __grid_constant__ NormArguments p, const __grid_constant__ NormGradients g) {
  using Unit = NormBackwardUnit<Element, unit, kind>;
  constexpr bool holds = holds_rows(unit);
  __shared__ float2 partial[2][kNormBackwardThreads / 32];
  __shared__ __align__(16) float dweights[kNormBackwardThreads * units * unit];
  const int team = static_cast<int>(threadIdx.x) / p.lanes, lane = static_cast<int>(threadIdx.x) % p.lanes;
  const uint32_t teams = blockDim.x / p.lanes, step = gridDim.x * teams;
  uint32_t row = blockIdx.x * teams + team;
  const float part = 1 / static_cast<float>(p.C);  // of a column in a mean
  float weight[units][unit] = {}, dweight[units][unit] = {};
  Unit next[units];
  // f(unit, j, c) of each unit of the row.
  const auto for_row = [&](Unit(&now)[units], const auto& f) {
    NormBackwardRow<Element> from;
    if constexpr (!holds) from = NormBackwardRow<Element>::template of<kind>(p, g, row);
    for_units<unit, units>(p, lane, [&](int j, int c) {
      if constexpr (!holds) {
        now[j].load(from, c);
        now[j].prepare();
        load_weight<Element>(weight[j], p, c);
      }
      f(now[j], j, c);
    });
  };
  const auto load_next = [&](uint32_t at) {
    if (!holds || at >= p.rows) return;
    const auto from = NormBackwardRow<Element>::template of<kind>(p, g, at);
    for_units<unit, units>(p, lane, [&](int j, int c) { next[j].load(from, c); });
  };
  griddepcontrol_wait();
  griddepcontrol_launch_dependents();
  load_next(row);
  if (holds) for_units<unit, units>(p, lane, [&](int j, int c) { load_weight<Element>(weight[j], p, c); });
  // Every thread of a CTA goes round as often: shuffles and barriers need them all.
  for (uint32_t first = blockIdx.x * teams, half = 0; first < p.rows; first += step, row += step, half ^= 1) {
    Unit now[units];
#pragma unroll
    for (int j = 0; j < units; ++j) now[j] = next[j];
    float2 sums = {0, 0};  // of z z and u z
    if (row < p.rows)
      for_row(now, [&](Unit& mine, int j, int) {
        if (holds) mine.prepare();
        mine.for_elements([&](int i, float z, float dy, float activated, float) {
          sums.x = fmaf(z, z, sums.x);
          sums.y = fmaf(dy * weight[j][i] * activated, z, sums.y);
        });
      });
    load_next(row + step);
    sums = sums_over_team(sums, p.lanes, team, partial[half] + team * p.lanes / 32);
    if (row >= p.rows) continue;
    const float r = rsqrtf(sums.x * part + p.eps), projection = r * sums.y * part;
    for_row(now, [&](const Unit& mine, int j, int c) {
      finish_unit(mine, g, int64_t{row} * p.C + c, r, projection, weight[j], dweight[j]);
    });
  }
  sum_over_teams(dweight, p, lane, dweights, g.partial_dweight + int64_t{blockIdx.x} * p.C);
}

}  // namespace jet::hopper
