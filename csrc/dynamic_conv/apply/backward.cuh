// The backward of the convolution with explicit taps, bound by reading and writing them. As in the forward a thread has
// 8 channels and walks over a run of tokens. A warp has a run, the warps of a CTA consecutive ones.
//
// dx of a token is complete W - 1 tokens later, so it is summed in a window of W slots. Terms that the first tokens of
// a run have for the run before it go to that warp through shared memory; the last warp computes those of the CTA
// behind it once more: (W - 1) / 128 of what is read. Every sum is taken in the order of the tokens and in single
// steps, so that bits do not depend on where a run begins.
#pragma once

#include "csrc/dynamic_conv/gradient.cuh"

namespace jet::hopper {

constexpr int kBackwardRun = 32;   // tokens of a warp
constexpr int kBackwardWarps = 4;  // of a CTA
constexpr int kBackwardThreads = 32 * kBackwardWarps;
constexpr int kBackwardChannels = 32 * 8;  // of a CTA

struct ApplyBackwardArguments {
  ConvSequences sequences;
  ConvStates states;
  ConvStateGradients gradients;
  int64_t D, x_stride, dy_stride;
  bool silu;
  const void *x, *taps, *dy;  // [tokens, D] in rows, [tokens, D, W], [tokens, D] in rows
  void *dx, *dtaps;           // [tokens, D], [tokens, D, W]
};

// The sequence that a token is in.
struct SequenceRange {
  int64_t n, begin, end;
  bool outside;  // of all sequences: gradients are zero
};

__device__ inline SequenceRange range_of_token(const ConvSequences& s, int64_t m) {
  const TokenPlace place = place_of_token<2>(s, m);
  if (place.outside) return {.n = 0, .begin = 0, .end = s.tokens, .outside = true};
  return {
      .n = place.row, .begin = sequence_bound(s, place.row), .end = sequence_bound(s, place.row + 1), .outside = false};
}

// What the first tokens of a run have for the run before it: of token k < W - 1 the taps w < W - 1 - k.
template <int W>
struct Handover {
  static constexpr int terms = W * (W - 1) / 2;
  __device__ static constexpr int index(int k, int w) { return k * (W - 1) - k * (k - 1) / 2 + w; }
  float4 values[kBackwardWarps - 1][terms][2][32];

  __device__ void put(int warp, int k, int w, const float (&g)[8]) {
    auto& to = values[warp][index(k, w)];
    to[0][threadIdx.x % 32] = make_float4(g[0], g[1], g[2], g[3]);
    to[1][threadIdx.x % 32] = make_float4(g[4], g[5], g[6], g[7]);
  }
  __device__ void get(int warp, int k, int w, float (&g)[8]) const {
    const auto& from = values[warp][index(k, w)];
    const float4 a = from[0][threadIdx.x % 32], b = from[1][threadIdx.x % 32];
    g[0] = a.x, g[1] = a.y, g[2] = a.z, g[3] = a.w, g[4] = b.x, g[5] = b.y, g[6] = b.z, g[7] = b.w;
  }
};

template <class Element, int W>
class ApplyBackwardRun {
 public:
  __device__ ApplyBackwardRun(const ApplyBackwardArguments& p, Handover<W>& handover, int64_t d, int warp)
      : p_(p),
        handover_(handover),
        d_(d),
        m0_((int64_t{blockIdx.x} * kBackwardWarps + warp) * kBackwardRun),
        m1_(min(m0_ + kBackwardRun, p.sequences.tokens)),
        warp_(warp) {}

  // The run's own tokens.
  __device__ void walk() {
    if (m0_ >= m1_ || d_ >= p_.D) return;
#pragma unroll
    for (int w = 1; w < W; ++w) window_[w] = input(m0_ - W + w);
    sequence_ = range_of_token(p_.sequences, m0_);
#pragma unroll 1
    for (int64_t m = m0_; m < m1_; ++m) {
      if (m == sequence_.end) {
        flush(m - 1);
        sequence_ = range_of_token(p_.sequences, m);
      }
      float g[W][8];
      differentiate(m, true, g);
      const int64_t k = m - m0_;
      if (k < W - 1 && warp_ > 0 && sequence_.begin < m0_) {
#pragma unroll
        for (int at = 0; at < W - 1; ++at)
          if (k == at)
#pragma unroll
            for (int w = 0; w < W - 1 - at; ++w) handover_.put(warp_ - 1, at, w, g[w]);
      }
      shift();
      add_some(g, W);
      emit(m - (W - 1), slots_[0]);
    }
  }

  // What the tokens behind the run have for it.
  __device__ void finish() {
    if (m0_ >= m1_ || d_ >= p_.D) return;
    const int64_t last = min(m1_ + (W - 1), sequence_.end);
    int64_t m = m1_;
#pragma unroll
    for (int k = 0; k < W - 1; ++k) {
      if (m >= last) continue;
      float g[W][8];
      if (warp_ == kBackwardWarps - 1) {
        differentiate(m, false, g);
      } else {
#pragma unroll
        for (int w = 0; w < W - 1 - k; ++w) handover_.get(warp_, k, w, g[w]);
      }
      shift();
      add_some(g, W - 1 - k);
      emit(m - (W - 1), slots_[0]);
      ++m;
    }
    flush(m - 1);
  }

 private:
  __device__ Elements<8> input(int64_t m) const {
    if (m < 0 || m >= p_.sequences.tokens) return {};
    return load_elements<8>(static_cast<const uint16_t*>(p_.x) + m * p_.x_stride + d_);
  }

  // g[w] = dz[m] taps[m, w], the gradient of input m - (W-1) + w; and dtaps of token m if it is `own`.
  __device__ void differentiate(int64_t m, bool own, float (&g)[W][8]) {
#pragma unroll
    for (int w = 0; w < W - 1; ++w) window_[w] = window_[w + 1];
    window_[W - 1] = input(m);
    Elements<8> x[W], raw[W];  // raw: taps [8, W]
    const int64_t at = (m * p_.D + d_) * W;
#pragma unroll
    for (int i = 0; i < W; ++i) raw[i] = load_elements<8>(static_cast<const uint16_t*>(p_.taps) + at + 8 * i);
    const Elements<8> dy = load_elements<8>(static_cast<const uint16_t*>(p_.dy) + m * p_.dy_stride + d_);
#pragma unroll
    for (int w = 0; w < W; ++w) x[w] = window_[w];
    const int64_t position = m - sequence_.begin;
    if (position < W - 1 && !sequence_.outside) {
      const TokenPlace place{.row = static_cast<int>(sequence_.n)};
      begin_of_sequence(x, load_state<8, W>(p_.states, place, d_), static_cast<int>(position));
    }
    float inputs[W][8], dz[8], z[8] = {};
#pragma unroll
    for (int i = 0; i < W; ++i) {
      float eight[8];
      unpack_elements<Element>(eight, raw[i]);
#pragma unroll
      for (int c = 0; c < 8; ++c) g[(8 * i + c) % W][(8 * i + c) / W] = eight[c];
    }
#pragma unroll
    for (int w = 0; w < W; ++w) {
      unpack_elements<Element>(inputs[w], x[w]);
#pragma unroll
      for (int c = 0; c < 8; ++c) z[c] += g[w][c] * inputs[w][c];  // z += taps[t, d, w] x[t - (W-1) + w, d]
    }
    unpack_elements<Element>(dz, dy);
#pragma unroll
    for (int c = 0; c < 8; ++c) dz[c] *= activation_slope(z[c], p_.silu);
    if (own) store_dtaps(at, dz, inputs);
#pragma unroll
    for (int w = 0; w < W; ++w)
#pragma unroll
      for (int c = 0; c < 8; ++c) g[w][c] = __fmul_rn(g[w][c], dz[c]);
  }

  // dtaps[m, d, w] = dz[m, d] x[m - (W-1) + w, d]
  __device__ void store_dtaps(int64_t at, const float (&dz)[8], const float (&inputs)[W][8]) const {
#pragma unroll
    for (int i = 0; i < W; ++i) {
      Elements<8> out;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int a = 8 * i + 2 * j, b = a + 1;
        out.words[j] = pack<Element>(dz[a / W] * inputs[a % W][a / W], dz[b / W] * inputs[b % W][b / W]);
      }
      if (sequence_.outside) out = {};
      store_elements(static_cast<uint16_t*>(p_.dtaps) + at + 8 * i, out);
    }
  }

  // The slots move on by a token.
  __device__ void shift() {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
#pragma unroll
      for (int w = 0; w < W - 1; ++w) slots_[w][c] = slots_[w + 1][c];
      slots_[W - 1][c] = 0;
    }
  }

  // dx += dz taps, of the first `taps` taps.
  __device__ void add_some(const float (&g)[W][8], int taps) {
#pragma unroll
    for (int w = 0; w < W; ++w)
      if (w < taps)
#pragma unroll
        for (int c = 0; c < 8; ++c) slots_[w][c] = __fadd_rn(slots_[w][c], g[w][c]);
  }

  // The slot of token q, or of the position of conv_state that q is if it lies before the sequence, is complete.
  __device__ void emit(int64_t q, const float (&sum)[8]) const {
    const int64_t position = q - sequence_.begin;
    const int64_t owner = position < 0 ? sequence_.begin : q;
    if (owner < m0_ || owner >= m1_) return;
    float total[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) total[c] = sum[c];
    if (!sequence_.outside)
      add_gradient_of_state_out<Element, 8, W>(total, p_.gradients.of_out, sequence_.n, p_.D, d_, position,
                                               sequence_.end - sequence_.begin);
    Elements<8> out;
#pragma unroll
    for (int j = 0; j < 4; ++j) out.words[j] = pack<Element>(total[2 * j], total[2 * j + 1]);
    if (position >= 0) {
      if (sequence_.outside) out = {};
      store_elements(static_cast<uint16_t*>(p_.dx) + q * p_.D + d_, out);
    } else if (!sequence_.outside) {
      auto* const to =
          static_cast<uint16_t*>(p_.gradients.of_in) + (sequence_.n * p_.D + d_) * (W - 1) + position + (W - 1);
#pragma unroll
      for (int c = 0; c < 8; ++c) to[c * (W - 1)] = static_cast<uint16_t>(out[c]);
    }
  }

  // After `last`, the last token that adds to the sequence's slots of this run.
  __device__ void flush(int64_t last) {
#pragma unroll
    for (int w = 1; w < W; ++w) emit(last - (W - 1) + w, slots_[w]);
#pragma unroll
    for (int w = 0; w < W; ++w)
#pragma unroll
      for (int c = 0; c < 8; ++c) slots_[w][c] = 0;
  }

  const ApplyBackwardArguments& p_;
  Handover<W>& handover_;
  const int64_t d_, m0_, m1_;
  const int warp_;
  SequenceRange sequence_;
  Elements<8> window_[W];
  float slots_[W][8] = {};  // of tokens m - (W-1) .. m
};

template <class Element, int W>
__global__ void __launch_bounds__(kBackwardThreads, 1)
    apply_backward_kernel(const __grid_constant__ ApplyBackwardArguments p) {
  __shared__ Handover<W> handover;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (blockIdx.y == 0)
    gradients_of_empty_sequences<W>(p.sequences, p.gradients, p.D, int64_t{blockIdx.x} * kBackwardWarps + warp,
                                    int64_t{gridDim.x} * kBackwardWarps);
  const int64_t d = int64_t{blockIdx.y} * kBackwardChannels + threadIdx.x % 32 * 8;
  ApplyBackwardRun<Element, W> run(p, handover, d, warp);
  run.walk();
  __syncthreads();
  run.finish();
}

}  // namespace jet::hopper
