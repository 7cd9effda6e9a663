// What the two kernels of the dynamic convolution share: the column order of a tile of kernels, and how it meets its
// inputs.
//
// A tile is made of 4 P channels, P W columns for each of the 4 threads of a row. Which row of the weight is column n:
// n = ((j W + w) 4 + c) 2 + e is tap w of channel P c + 2 j + e. The tensor map does that permutation. As thread t of a
// warp holds the columns 8 i + 2 (t % 4) + {0, 1} of an accumulator, it has all taps of the P consecutive channels P (t
// % 4) .. + P - 1: the convolution needs no shuffle, and x, y and states are accessed 2 P bytes at a time.
#pragma once

#include <type_traits>

#include "csrc/dynamic_conv/window.cuh"
#include "csrc/hopper/cluster.h"
#include "csrc/hopper/launch.h"
#include "csrc/hopper/pipeline.h"
#include "csrc/hopper/tensor_map.h"
#include "csrc/hopper/wgmma.h"

namespace jet::hopper {

struct DynamicConvArguments {
  ConvSequences sequences;
  ConvStates states;
  int64_t D;
  int panels;  // of 64 along R
  bool silu;
  const void* bias;  // or null
  void* y;
};

// What dynamic_conv and dynamic_conv_step have in common: M tokens in rows.
struct DynamicConvLaunch {
  const char* op;
  Dtype dtype;
  int64_t D, R, W;
  const void *x, *hidden, *weight;
  int64_t x_stride, hidden_stride;
  DynamicConvArguments arguments;  // all but panels
};

template <class Element_, int W_, int P_, int M_>
struct ConvTile {
  using Element = Element_;
  static constexpr int W = W_, P = P_;
  static constexpr int M = M_;            // tokens
  static constexpr int channels = 4 * P;  // 4 threads have a row
  static constexpr int N = channels * W;  // columns of the GEMM
  static constexpr int K = 64;            // of a stage: 128 bytes, the widest swizzle
  using TileA = OperandTile<Element, Swizzle::b128, Major::k, M, K>;
  using TileB = OperandTile<Element, Swizzle::b128, Major::k, N, K>;
  using A = Operand<Element, Swizzle::b128, Major::k, M, K>;
  using B = Operand<Element, Swizzle::b128, Major::k, N, K>;
  using Mma = Wgmma<Element, N>;
  static constexpr int x_rows = M + W - 1;
  static constexpr int x_bytes = x_rows * channels * 2;

  // Where the bias of column (d - d0) W + w lies in shared memory: what 4 threads read together lies in different
  // banks.
  __device__ static constexpr int bias_at(int column) { return column + column / 32 * 4; }
  static constexpr int bias_size = N + N / 32 * 4;
};

// One thread's bias, kept by the columns of `Tile`.
template <class Tile>
__device__ float load_bias(const DynamicConvArguments& p, int tile, int thread) {
  const int64_t column = int64_t{tile} * Tile::N + thread;
  if (p.bias == nullptr || thread >= Tile::N || column >= p.D * Tile::W) return 0;
  return load_as_float(p.bias, std::is_same_v<typename Tile::Element, bf16> ? Dtype::bf16 : Dtype::f16, column);
}

// The bias of this thread's P channels.
template <class Tile>
__device__ void read_bias(float (&bias)[Tile::P][Tile::W], const float* shared_bias) {
  constexpr int W = Tile::W;
#pragma unroll
  for (int i = 0; i < Tile::P * W / 4; ++i) {
    const float4 four =
        *reinterpret_cast<const float4*>(shared_bias + Tile::bias_at(threadIdx.x % 4 * Tile::P * W + 4 * i));
    bias[4 * i / W][4 * i % W] = four.x, bias[(4 * i + 1) / W][(4 * i + 1) % W] = four.y;
    bias[(4 * i + 2) / W][(4 * i + 2) % W] = four.z, bias[(4 * i + 3) / W][(4 * i + 3) % W] = four.w;
  }
}

// Bytes between the tokens of two rows in shared memory, and where a thread's channels begin there.
template <class Tile>
constexpr int kRowBytes = Tile::channels * 2;
template <class Tile>
__device__ const char* own_window(const char* x_tile, int row, int thread) {
  return x_tile + row * kRowBytes<Tile> + thread % 4 * Tile::P * 2;
}

// The inputs x[w] = x[t - (W-1) + w] of a thread's channels: `window` is where the first lies in shared memory.
template <class Tile>
__device__ void read_window(Elements<Tile::P> (&x)[Tile::W], const char* window) {
#pragma unroll
  for (int w = 0; w < Tile::W; ++w) x[w] = load_elements<Tile::P>(window + w * kRowBytes<Tile>);
}

// One token: its kernels are the registers of half `upper` of `kernel`, its window is x; P channels from d.
template <class Tile>
__device__ void convolve_row(const typename Tile::Mma::Accumulator& kernel, const float (&bias)[Tile::P][Tile::W],
                             const Elements<Tile::P> (&x)[Tile::W], const DynamicConvArguments& p,
                             const TokenPlace& place, typename Tile::Element* to, int64_t d, int upper) {
  constexpr int W = Tile::W, P = Tile::P;
  using Element = typename Tile::Element;
  float z[P] = {};
#pragma unroll
  for (int w = 0; w < W; ++w) {
    float input[P];
    unpack_elements<Element>(input, x[w]);
#pragma unroll
    for (int c = 0; c < P; ++c)
      z[c] += (kernel[(c / 2 * W + w) * 4 + upper * 2 + c % 2] + bias[c][w]) *
              input[c];  // z += kernel[t, d, w] x[t - (W-1) + w, d]
  }
  Elements<P> y = activate<Element>(z, p.silu);
  if (place.outside) y = {};
  store_elements(to, y);
  if (place.last && !place.outside) end_of_sequence(x, p.states, place, d);
}

// A warp's part of the sequences without tokens, `warp` of `warps`.
template <class Tile>
__device__ void pass_states_on(const DynamicConvArguments& p, int64_t warp, int64_t warps) {
  if (p.sequences.cu_seqlens == nullptr) return;
  for (int64_t n = warp; n < p.sequences.N; n += warps)
    if (sequence_bound(p.sequences, n) == sequence_bound(p.sequences, n + 1)) pass_state_on<Tile::W>(p.states, n, p.D);
}

struct DynamicConvMaps {
  CUtensorMap hidden, weight, x;

  __device__ void prefetch_all() const {
    prefetch_tensormap(weight);
    prefetch_tensormap(hidden);
    prefetch_tensormap(x);
  }
};

// ---- Host
// The weight [D*W, R] comes in boxes of `weight_parts` to a tile.
template <class Tile>
DynamicConvMaps make_dynamic_conv_maps(const DynamicConvLaunch& l, int weight_parts) {
  const int64_t M = l.arguments.sequences.tokens;
  // One row's stride means nothing to its tensor, but a tensor map checks it.
  const int64_t x_stride = M == 1 ? l.D : l.x_stride, hidden_stride = M == 1 ? l.R : l.hidden_stride;
  constexpr uint32_t W = Tile::W, P = Tile::P;
  const uint64_t R = l.R, D = l.D, row = R * 2;
  return {make_operand_map<typename Tile::TileA>("hidden", l.hidden, l.dtype, M, R, hidden_stride),
          make_tensor_map({"weight",
                           l.weight,
                           l.dtype,
                           5,
                           // r          e             c                  w             j
                           {R, 2, D / P, W, P / 2},
                           {0, W * row, P * W * row, row, 2 * W * row},
                           {Tile::K, 2, 4, W, P / 2 / weight_parts},
                           Swizzle::b128}),
          make_tensor_map({"x",
                           l.x,
                           l.dtype,
                           2,
                           {D, static_cast<uint64_t>(M)},
                           {0, static_cast<uint64_t>(x_stride) * 2},
                           {Tile::channels, Tile::x_rows},
                           Swizzle::none})};
}

}  // namespace jet::hopper
