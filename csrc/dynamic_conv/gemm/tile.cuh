// What the two kernels of the generator's GEMM share: the tile of taps that a warpgroup has in its accumulators, and
// the epilogue that convolves it with x.
//
// A tile has 4 P channels; their 4 P W taps are its N columns. Column n = ((j W + w) 4 + c) 2 + e is tap w of channel
// P c + 2 j + e: the tensor map of the weight permutes the rows as they are loaded. Thread t of a warp holds the
// columns 8 i + 2 (t % 4) + {0, 1} of an accumulator, which are all taps of the P consecutive channels from P (t % 4)
// on. So the convolution needs no shuffle, and x, y and states are accessed 2 P bytes at a time.
#pragma once

#include <type_traits>

#include "csrc/dynamic_conv/window.cuh"
#include "csrc/hopper/launch.h"
#include "csrc/hopper/pipeline.h"
#include "csrc/hopper/tensor_map.h"
#include "csrc/hopper/tma.h"
#include "csrc/hopper/wgmma.h"

namespace jet::hopper {

struct DynamicConvArguments {
  ConvSequences sequences;
  ConvStates states;
  int64_t D;
  int panels;  // of 64 along R
  bool silu;
  const void* bias;  // [D*W], or null
  void* y;           // [tokens, D]
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
  using A = MatrixDescriptor<TileA>;
  using B = MatrixDescriptor<TileB>;
  using Mma = Wgmma<Element, N>;
  static constexpr int x_rows = M + W - 1;  // with the halo: row i is token m0 - (W-1) + i
  static constexpr int x_row_bytes = channels * 2;
  static constexpr int x_bytes = x_rows * x_row_bytes;

  // Where the bias of column (d - d0) W + w lies in shared memory. The padding puts what 4 threads read together into
  // different banks.
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

// Where the window of a thread's channels begins in shared memory, for the token of row `row`.
template <class Tile>
__device__ const char* own_window(const char* x_tile, int row, int thread) {
  return x_tile + row * Tile::x_row_bytes + thread % 4 * Tile::P * 2;
}

// The inputs x[w] = x[t - (W-1) + w] of a thread's channels, from own_window().
template <class Tile>
__device__ void read_window(Elements<Tile::P> (&x)[Tile::W], const char* window) {
#pragma unroll
  for (int w = 0; w < Tile::W; ++w) x[w] = load_elements<Tile::P>(window + w * Tile::x_row_bytes);
}

// The epilogue of one token and the P channels from d on. Its taps are the registers of half `upper` of the accumulator
// (accumulator_row), its window is x.
template <class Tile>
__device__ void convolve_row(const typename Tile::Mma::Accumulator& taps, const float (&bias)[Tile::P][Tile::W],
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
    for (int c = 0; c < P; ++c) {
      // z += taps[t, d, w] x[t - (W-1) + w, d]
      z[c] += (taps[(c / 2 * W + w) * 4 + upper * 2 + c % 2] + bias[c][w]) * input[c];
    }
  }
  Elements<P> y = activate<Element>(z, p.silu);
  if (place.outside) y = {};
  store_elements(to, y);
  if (place.last && !place.outside) end_of_sequence(x, p.states, place, d);
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
// A call of dynamic_conv or of dynamic_conv_step.
struct DynamicConvCall {
  const char* op;
  const ConvInputs& in;
  const TapGenerator& generator;
  ConvSequences sequences;
  ConvStates states;
  void* y;

  template <class Tile>
  DynamicConvArguments arguments() const {
    return {.sequences = sequences,
            .states = states,
            .D = in.D,
            .panels = static_cast<int>((generator.R + Tile::K - 1) / Tile::K),
            .silu = in.silu,
            .bias = generator.bias,
            .y = y};
  }

  // `weight_boxes`: in how many boxes the weight of a tile is loaded.
  template <class Tile>
  DynamicConvMaps maps(int weight_boxes) const {
    const Dtype dtype = in.x.dtype;
    constexpr uint32_t W = Tile::W, P = Tile::P;
    const uint64_t M = sequences.tokens, R = generator.R, D = in.D, weight_row = R * 2;
    // One row's stride means nothing to its tensor, but a tensor map checks it.
    const uint64_t x_stride = M == 1 ? D : row_stride(in, in.x);
    const uint64_t hidden_stride = M == 1 ? R : row_stride(in, generator.hidden);
    return {
        .hidden = make_operand_map<typename Tile::TileA>("hidden", generator.hidden.data, dtype, M, R, hidden_stride),
        // Column ((j W + w) 4 + c) 2 + e of a tile is row (P c + 2 j + e) W + w of its part of the weight [D*W, R].
        .weight = make_tensor_map({
            .name = "weight",
            .data = generator.weight,
            .dtype = dtype,
            .rank = 5,  // r, e, c, w, j
            .extent = {R, 2, D / P, W, P / 2},
            .stride_bytes = {0, W * weight_row, P * W * weight_row, weight_row, 2 * W * weight_row},
            .box = {Tile::K, 2, 4, W, P / 2 / weight_boxes},
            .swizzle = Swizzle::b128,
        }),
        .x = make_tensor_map({
            .name = "x",
            .data = in.x.data,
            .dtype = dtype,
            .rank = 2,
            .extent = {D, M},
            .stride_bytes = {0, x_stride * 2},
            .box = {Tile::channels, Tile::x_rows},
            .swizzle = Swizzle::none,
        })};
  }
};

}  // namespace jet::hopper
