// attention_step on a GPU: bound by reading keys and values once. docs/attention_step.md has the data sheet.
//
// A CTA has a sequence, a key head and a split: a range of its slots. A warp takes every fourth tile of 16 keys, loads
// its tiles itself through a ring of stages, and keeps for the 16 rows of an mma
//   S = Q K^T                      [16, 16]  rows are the queries of the group
//   m, l                           [16]      largest score so far; sum of exponentials
//   O = e^{m' - m} O + P V         [16, D]   P = e^{S - m}
// At the end the warps add up in shared memory, and the sums of a split go to memory. attention_combine_kernel adds up
// the splits. With at most 8 queries, rows 8.. of P are what rounding to 16 bits takes from rows 0..7: the product is
// that of P in fp32, for nothing.
#pragma once

#include "csrc/attention/kernel_takes.h"
#include "csrc/hopper/cp_async.h"
#include "csrc/hopper/launch.h"
#include "csrc/hopper/mma.h"

namespace jet::hopper {

struct AttentionArguments {
  AttentionStepParams p;
  int64_t split;      // keys of a CTA
  int splits, group;  // CTAs of a sequence and key head, of a full cache; queries of a key head
  float scale;        // with log2 e: exponentials are of base 2
  float* o;           // [N, H, splits, D]
  float2* sums;       // [N, H, splits] m and l
};

template <class Element_, int D_, bool wide_>
struct AttentionConfig {
  using Element = Element_;
  static constexpr int D = D_;
  static constexpr bool wide = wide_;  // more than 8 queries
  static constexpr int stages = 3;     // 96 KB at D = 128: two CTAs on a multiprocessor
  static constexpr int row_bytes = D * 2;
  static constexpr int tile_bytes = kAttentionKeys * row_bytes;  // keys, and then values, of a stage
  static constexpr int warp_bytes = stages * 2 * tile_bytes;
  static constexpr int shared_bytes = kAttentionWarps * warp_bytes;
  static constexpr int rows = wide ? 16 : 8;
  static constexpr int pitch = D + 8;  // floats of a row of sums: four rows of 32 bytes lie in different banks
  static_assert(warp_bytes >= rows * (pitch + 2) * 4, "a warp leaves its sums where its stages were");
};

// Byte offset of 16-byte unit `unit` of row `row` of a tile: 8 rows of one unit lie in different banks.
template <class Config>
__device__ int tile_offset(int row, int unit) {
  return row * Config::row_bytes + (unit ^ (row & 7)) * 16;
}

template <class Element>
__device__ float element(const TokenTensor& x, int64_t n, int64_t h, int64_t d) {
  const auto* const from = static_cast<const uint16_t*>(x.data) + n * x.strides.b + h * x.strides.h + d * x.strides.d;
  return unpack<Element>(*from).x;
}
__device__ inline float angle(const TokenTensor& x, int64_t n, int64_t d) {
  return static_cast<const float*>(x.data)[n * x.strides.b + d * x.strides.d];
}

// Columns c and c + D/2 of rotate(x), rounded: the first in the low half.
template <class Element, int D>
__device__ float2 rotated(const AttentionStepParams& p, const TokenTensor& x, int64_t n, int64_t h, int c) {
  const float a = element<Element>(x, n, h, c), b = element<Element>(x, n, h, c + D / 2);
  return {a * angle(p.cos, n, c) - b * angle(p.sin, n, c),
          b * angle(p.cos, n, c + D / 2) + a * angle(p.sin, n, c + D / 2)};
}

// What a warp's copies and their rows need.
template <class Config>
struct AttentionTiles {
  const uint16_t *key, *value;  // of the sequence and the key head
  int64_t key_row, value_row, used, slot;
  char* stages;

  __device__ char* keys(int stage) const { return stages + stage * 2 * Config::tile_bytes; }
  __device__ char* values(int stage) const { return keys(stage) + Config::tile_bytes; }

  // Slots first .. first + 15 that are used, but not the new token's. A group of copies, also of none.
  __device__ void load(int stage, int64_t first, int64_t end) const {
    constexpr int units = Config::row_bytes / 16;
    if (first < end) {
#pragma unroll Config::D == 256 ? 4 : 8
      for (int i = 0; i < kAttentionKeys * units / 32; ++i) {
        const int at = i * 32 + static_cast<int>(threadIdx.x) % 32, row = at / units, unit = at % units;
        const bool asked = first + row < used && first + row != slot;
        const int64_t from = asked ? first + row : first;
        cp_async_16(keys(stage) + tile_offset<Config>(row, unit), key + from * key_row + unit * 8, asked);
        cp_async_16(values(stage) + tile_offset<Config>(row, unit), value + from * value_row + unit * 8, asked);
      }
    }
    cp_async_commit_group();
  }
};

// The new token to its slot, and to its row of the tile.
template <class Config>
__device__ void write_token(const AttentionStepParams& p, const AttentionTiles<Config>& tiles, int stage, int row,
                            int64_t n, int64_t h) {
  using Element = typename Config::Element;
  auto* const key = const_cast<uint16_t*>(tiles.key) + tiles.slot * tiles.key_row;
  auto* const value = const_cast<uint16_t*>(tiles.value) + tiles.slot * tiles.value_row;
  const auto put = [&](char* tile, uint16_t* to, int c, uint32_t bits) {
    to[c] = static_cast<uint16_t>(bits);
    *reinterpret_cast<uint16_t*>(tile + tile_offset<Config>(row, c / 8) + c % 8 * 2) = static_cast<uint16_t>(bits);
  };
  for (int c = threadIdx.x % 32; c < Config::D / 2; c += 32) {
    const float2 k = rotated<Element, Config::D>(p, p.k, n, h, c);
    const uint32_t both = pack<Element>(k.x, k.y);
    put(tiles.keys(stage), key, c, both & 0xffff);
    put(tiles.keys(stage), key, c + Config::D / 2, both >> 16);
    for (const int d : {c, c + Config::D / 2})
      put(tiles.values(stage), value, d, pack<Element>(element<Element>(p.v, n, h, d), 0) & 0xffff);
  }
}

// Rotated queries of the group as A operands [16, D]; rows past the group are zero.
template <class Config>
__device__ void load_queries(uint32_t (&q)[Config::D / 16][4], const AttentionArguments& a, int64_t n, int64_t h) {
  using Element = typename Config::Element;
  constexpr int half = Config::D / 32;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int s = 0; s < half; ++s)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = a_fragment_row(lane, i);
      float2 x[2] = {};
      if ((Config::wide || i % 2 == 0) && row < a.group) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
          x[e] = rotated<Element, Config::D>(a.p, a.p.q, n, h * a.group + row, s * 16 + a_fragment_k(lane, i, e));
      }
      q[s][i] = pack<Element>(x[0].x, x[1].x);
      q[s + half][i] = pack<Element>(x[0].y, x[1].y);
    }
}

// Rows t/4 and t/4 + 8 of a warp; without `wide` the second is the rest of the first.
template <class Config>
struct AttentionSums {
  float o[Config::D / 16][8] = {};
  float most[2] = {-INFINITY, -INFINITY};
  float sum[2] = {};  // of this thread's columns
};

// Scores [16, 16] to P, as an A operand.
template <class Config>
__device__ void soften(uint32_t (&p)[4], float (&s)[8], AttentionSums<Config>& sums, float scale, int64_t keys) {
  using Element = typename Config::Element;
  constexpr int halves = Config::wide ? 2 : 1;
#pragma unroll
  for (int r = 0; r < halves; ++r) {
    float most = sums.most[r];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& x = s[i / 2 * 4 + r * 2 + i % 2];
      x = accumulator_column(threadIdx.x, i / 2 * 4 + i % 2) < keys ? x * scale : -INFINITY;
      most = fmaxf(most, x);
    }
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    const float reference = most == -INFINITY ? 0 : most, factor = exp2f(sums.most[r] - reference);
    sums.most[r] = most;
    sums.sum[r] *= factor;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& x = s[i / 2 * 4 + r * 2 + i % 2];
      x = exp2f(x - reference);
      sums.sum[r] += x;
    }
#pragma unroll
    for (int c = 0; c < Config::D / 16; ++c)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (halves == 1 || i / 2 % 2 == r) sums.o[c][i] *= factor;
  }
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    p[i] = pack<Element>(s[2 * i], s[2 * i + 1]);
    if constexpr (Config::wide) {
      p[i + 1] = pack<Element>(s[2 * i + 2], s[2 * i + 3]);
    } else {
      const float2 rounded = unpack<Element>(p[i]);
      p[i + 1] = pack<Element>(s[2 * i] - rounded.x, s[2 * i + 1] - rounded.y);
    }
  }
}

// One tile: S = Q K^T, P, O += P V.
template <class Config>
__device__ void attend(AttentionSums<Config>& sums, const uint32_t (&q)[Config::D / 16][4], const char* keys,
                       const char* values, float scale, int64_t count) {
  using Element = typename Config::Element;
  const int lane = threadIdx.x % 32;
  float s[8] = {};
#pragma unroll
  for (int k = 0; k < Config::D / 16; ++k) {
    uint32_t b[4];
    ldmatrix_x4(b, keys + tile_offset<Config>(ldmatrix_b_n(lane), 2 * k + ldmatrix_b_k(lane) / 8));
    mma_m16n16k16<Element>(s, q[k], b);  // S += Q K^T   [16 queries, 16 keys]
  }
  uint32_t p[4];
  soften<Config>(p, s, sums, scale, count);
#pragma unroll
  for (int c = 0; c < Config::D / 16; ++c) {
    uint32_t b[4];
    ldmatrix_x4_trans(b, values + tile_offset<Config>(lane % 16, 2 * c + lane / 16));
    mma_m16n16k16<Element>(sums.o[c], p, b);  // O += P V   [16 queries, 16 columns]
  }
}

// m and l of `parts` that lie `stride` apart, put together: what each part is multiplied with follows from m.
__device__ inline float weight_of(float most, float all) { return exp2f(most - (all == -INFINITY ? 0 : all)); }

// The sums of the warps, in their order, to memory.
template <class Config>
__device__ void add_up_warps(const AttentionArguments& a, AttentionSums<Config>& sums, char* memory, int64_t n,
                             int64_t h, int split) {
  constexpr int D = Config::D, rows = Config::rows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto o_of = [&](int w) { return reinterpret_cast<float*>(memory + w * Config::warp_bytes); };  // [rows, pitch]
  const auto sums_of = [&](int w) { return reinterpret_cast<float2*>(o_of(w) + rows * Config::pitch); };  // [rows]
#pragma unroll
  for (int r = 0; r < rows / 8; ++r) {
    const int row = lane / 4 + 8 * r;
#pragma unroll
    for (int c = 0; c < D / 16; ++c)
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        float* const x = sums.o[c] + i + 2 * r;
        if constexpr (!Config::wide) x[0] += x[2], x[1] += x[3];
        *reinterpret_cast<float2*>(o_of(warp) + row * Config::pitch + c * 16 + accumulator_column(lane, i)) = {x[0],
                                                                                                               x[1]};
      }
    float sum = sums.sum[r];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % 4 == 0) sums_of(warp)[row] = {sums.most[r], sum};
  }
  __syncthreads();
#pragma unroll 1
  for (int at = threadIdx.x * 4; at < a.group * D; at += blockDim.x * 4) {
    const int row = at / D, column = at % D;
    float most = -INFINITY, sum = 0, o[4] = {};
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) most = fmaxf(most, sums_of(w)[row].x);
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      const float weight = weight_of(sums_of(w)[row].x, most);
      const float4 part = *reinterpret_cast<const float4*>(o_of(w) + row * Config::pitch + column);
      sum += weight * sums_of(w)[row].y;
      o[0] += weight * part.x, o[1] += weight * part.y, o[2] += weight * part.z, o[3] += weight * part.w;
    }
    const int64_t to = (n * a.p.H + h * a.group + row) * a.splits + split;
    store_rounded(a.o, Dtype::f32, to * D + column, o);
    if (column == 0) a.sums[to] = {most, sum};
  }
}

template <class Config>
__global__ void __launch_bounds__(kAttentionWarps * 32)
    attention_step_kernel(const __grid_constant__ AttentionArguments a) {
  extern __shared__ __align__(128) char memory[];
  const AttentionStepParams& p = a.p;
  const int split = blockIdx.x, warp = threadIdx.x / 32;
  const int64_t h = blockIdx.y, n = blockIdx.z;
  griddepcontrol_wait();
  const int64_t length = p.lengths[n], begin = split * a.split;
  const int64_t used = min(length, p.L - 1) + 1, end = min(begin + a.split, used);
  griddepcontrol_launch_dependents();
  if (begin >= end) return;  // of a negative length too
  const AttentionCacheStrides &ks = p.key.strides, &vs = p.value.strides;
  const AttentionTiles<Config> tiles{.key = static_cast<const uint16_t*>(p.key.data) + n * ks.n + h * ks.h,
                                     .value = static_cast<const uint16_t*>(p.value.data) + n * vs.n + h * vs.h,
                                     .key_row = ks.l,
                                     .value_row = vs.l,
                                     .used = used,
                                     .slot = length < p.L ? length : length % p.L,
                                     .stages = memory + warp * Config::warp_bytes};
  int64_t first = begin + warp * kAttentionKeys;
#pragma unroll
  for (int s = 0; s < Config::stages - 1; ++s) tiles.load(s, first + s * kAttentionTile, end);
  uint32_t q[Config::D / 16][4];
  load_queries<Config>(q, a, n, h);
  AttentionSums<Config> sums;
  int stage = 0;
#pragma unroll 1
  for (; first < end; first += kAttentionTile) {
    const int last = stage == 0 ? Config::stages - 1 : stage - 1;
    tiles.load(last, first + (Config::stages - 1) * kAttentionTile, end);
    cp_async_wait_group<Config::stages - 1>();
    __syncwarp();
    if (first <= tiles.slot && tiles.slot < first + kAttentionKeys) {
      write_token<Config>(p, tiles, stage, static_cast<int>(tiles.slot - first), n, h);
      __syncwarp();
    }
    attend<Config>(sums, q, tiles.keys(stage), tiles.values(stage), a.scale, used - first);
    __syncwarp();  // the next copies come into this stage
    stage = stage == Config::stages - 1 ? 0 : stage + 1;
  }
  cp_async_wait_group<0>();
  __syncwarp();
  add_up_warps<Config>(a, sums, memory, n, h, split);
}

constexpr int kCombineThreads = 64;

// o[n,h,:] from the sums of the splits, in their order.
template <class Config>
__global__ void __launch_bounds__(kCombineThreads)
    attention_combine_kernel(const __grid_constant__ AttentionArguments a) {
  constexpr int columns = Config::D / kCombineThreads;
  griddepcontrol_wait();
  const int64_t h = blockIdx.x, n = blockIdx.y, row = n * a.p.H + h, length = a.p.lengths[n];
  const int64_t used = min(length, a.p.L - 1) + 1;
  const int splits = used <= 0 ? 0 : static_cast<int>((used + a.split - 1) / a.split);
  const float2* const sums = a.sums + row * a.splits;
  const float* const o = a.o + row * a.splits * Config::D + threadIdx.x;
  float most = -INFINITY, sum = 0, x[columns] = {};
#pragma unroll 4
  for (int s = 0; s < splits; ++s) most = fmaxf(most, sums[s].x);
#pragma unroll 4
  for (int s = 0; s < splits; ++s) {
    const float2 part = sums[s];
    const float weight = weight_of(part.x, most);
    sum += weight * part.y;
#pragma unroll
    for (int c = 0; c < columns; ++c) x[c] += weight * o[s * Config::D + c * kCombineThreads];
  }
  auto* const to = static_cast<uint16_t*>(a.p.o) + row * Config::D + threadIdx.x;
#pragma unroll
  for (int c = 0; c < columns; ++c)
    to[c * kCombineThreads] =
        static_cast<uint16_t>(pack<typename Config::Element>(splits == 0 ? 0 : x[c] / sum, 0) & 0xffff);
}

}  // namespace jet::hopper
