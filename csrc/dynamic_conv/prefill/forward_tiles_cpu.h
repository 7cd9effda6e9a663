// The forward with the generator's GEMM in the tile registers of AMX.
//
//   sums [32, W, 16] = hidden [32, R] weight^T [R, 16 W]     of 32 tokens and a panel of 16 channels
//
// A task owns up to 8 panels: their packed weight (400 KB at R = 384) stays in L2, 32 rows of hidden (24 KB) in L1
// while the panels pass, and rows of x and y are read and written 256 bytes at a time.
#pragma once

#include "csrc/cpu/amx.h"
#include "csrc/dynamic_conv/prefill/dynamic_conv.h"
#include "csrc/dynamic_conv/product_cpu.h"
#include "csrc/dynamic_conv/rows_cpu.h"

#if defined(__AVX512F__)

namespace jet::cpu::JET_CPU_ISA {

inline bool tile_forward_takes(const DynamicConvParams& p) {
  return p.in.x.dtype == Dtype::bf16 && amx_bf16_is_active();
}

template <int W>
class TileForward {
  static constexpr long L = kTileSide;        // channels of a panel
  static constexpr long M = 2 * kTileSide;    // tokens of a block
  static constexpr long kMostPanels = 8;      // of a task
  static constexpr long kRoundTokens = 4096;  // whose hidden rows are packed at a time
  static constexpr long kPairs = kTileColumns / 2;

 public:
  explicit TileForward(const DynamicConvParams& p)
      : p_(p),
        in_(p.in),
        steps_((p.generator.R + kTileColumns - 1) / kTileColumns),
        panel_units_(steps_ * kPairs * W * L),
        rows_(in_.B * in_.T) {
    fill_rows(in_, rows_.get());
  }

  void run(const Parallel& parallel) const {
    const long tokens = in_.B * in_.T, panels = (in_.D + L - 1) / L, slots = larger(1, parallel.threads);
    for_work(parallel, kCopy * in_.N * in_.D * W)(0, in_.N, 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) write_conv_state(in_, n, static_cast<bf16*>(p_.conv_state_out));
    });
    if (tokens == 0 || panels == 0) return;
    const long of_task = larger(1, smaller(kMostPanels, panels / (4 * slots)));
    const long groups = (panels + of_task - 1) / of_task, round = smaller(tokens, kRoundTokens);
    const long blocks = (round + M - 1) / M;
    // Few channels: tasks get fewer tokens instead, at the price of packing the panels several times.
    const long parts = groups >= 4 * slots ? 1 : larger(1, smaller(4 * slots / groups, round / 256));
    const long part_blocks = (blocks + parts - 1) / parts;
    Buffer<bf16> hidden(blocks * M * row());
    Buffer<uint32_t> panel(slots * of_task * panel_units_);
    for (long begin = 0; begin < tokens; begin += round) {
      const long end = smaller(tokens, begin + round), round_blocks = (end - begin + M - 1) / M;
      for_work(parallel, kCopy * (end - begin) * row())(0, round_blocks, 4, [&](int64_t first, int64_t last) {
        for (int64_t i = first * M; i < last * M; ++i) pack_hidden(begin + i, end, hidden.get() + i * row());
      });
      run_tasks(parallel, slots, groups * parts, [&](long slot, long task) {
        const long first = task % parts * part_blocks, last = smaller(round_blocks, first + part_blocks);
        const long panel0 = task / parts * of_task;
        run_group(panel0, smaller(of_task, panels - panel0), begin, end, first, last, hidden.get(),
                  panel.get() + slot * of_task * panel_units_);
      });
    }
  }

 private:
  long row() const { return steps_ * kTileColumns; }

  // [row()] = the hidden row of a token, zeros beyond R and from `end` on.
  void pack_hidden(long token, long end, bf16* out) const {
    const long R = token < end ? p_.generator.R : 0, stride = p_.generator.hidden.strides.d;
    const bf16* from = R ? token_at<bf16>(p_.generator.hidden, in_, rows_.get()[token], token) : nullptr;
    if (stride == 1) {
      if (R) __builtin_memcpy(out, from, R * sizeof(bf16));
    } else {
      for (long r = 0; r < R; ++r) out[r] = from[r * stride];
    }
    for (long r = R; r < row(); ++r) out[r] = bf16{};
  }

  void run_group(long panel0, long panels, long begin, long end, long first, long last, const bf16* hidden,
                 uint32_t* packed) const {
    alignas(64) float bias[kMostPanels][W * L], sums[M * W * L];
    const long R = p_.generator.R, units = units_for(R, 2);
    for (long g = 0; g < panels; ++g) {
      const long d0 = (panel0 + g) * L, n = smaller(L, in_.D - d0);
      uint32_t* panel = packed + g * panel_units_;
      pack_weight_panel<Bf16Product, bf16, W>(static_cast<const bf16*>(p_.generator.weight), R, d0, n, panel);
      for (long i = units * W * L; i < panel_units_; ++i) panel[i] = 0;
      pack_bias_panel<bf16, W>(static_cast<const bf16*>(p_.generator.bias), d0, n, bias[g]);
    }
    const WholeTiles tiles;
    for (long block = first; block < last; ++block) {
      const long token = begin + block * M, d0 = panel0 * L;
      prefetch_rows(token, end, d0, smaller(panels * L, in_.D - d0));
      for (long g = 0; g < panels; ++g) {
        const bf16* rows = hidden + block * M * row();
        const uint32_t* panel = packed + g * panel_units_;
        multiply<0, 2>(rows, panel, sums);
        if constexpr (W > 2) multiply<2, W - 2>(rows, panel, sums);
        convolve_block(token, end, (panel0 + g) * L, bias[g], sums);
      }
    }
  }

  // The rows of x and y of a block, `n` channels of each, arrive while the sums of the first panel are made.
  void prefetch_rows(long token, long end, long d0, long n) const {
    if (in_.x.strides.d != 1) return;
    for (long i = 0; i < M && token + i < end; ++i) {
      const bf16* x = token_at<bf16>(in_.x, in_, rows_.get()[token + i], token + i) + d0;
      const bf16* y = static_cast<const bf16*>(p_.y) + (token + i) * in_.D + d0;
      for (long j = 0; j < n; j += 64 / long(sizeof(bf16))) __builtin_prefetch(x + j), __builtin_prefetch(y + j, 1);
    }
  }

  // sums [32, taps, 16] of taps [w0, w0 + count)
  template <int w0, int count>
  void multiply(const bf16* rows, const uint32_t* panel, float* sums) const {
    const long row_bytes = row() * long(sizeof(bf16));
    constexpr long pair_bytes = W * L * sizeof(uint32_t), sum_bytes = W * L * sizeof(float);
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    panel += w0 * L;
    for (long step = 0; step < steps_; ++step, rows += kTileColumns, panel += kPairs * W * L) {
      tile_load<4>(rows, row_bytes);
      tile_load<5>(rows + L * row(), row_bytes);
      tile_load<6>(panel, pair_bytes);
      tile_multiply_add<0, 4, 6>();
      tile_multiply_add<1, 5, 6>();
      if constexpr (count == 2) {
        tile_load<7>(panel + L, pair_bytes);
        tile_multiply_add<2, 4, 7>();
        tile_multiply_add<3, 5, 7>();
      }
    }
    float* out = sums + w0 * L;
    tile_store<0>(out, sum_bytes);
    tile_store<1>(out + L * W * L, sum_bytes);
    if constexpr (count == 2) tile_store<2>(out + L, sum_bytes);
    if constexpr (count == 2) tile_store<3>(out + L * W * L + L, sum_bytes);
  }

  void convolve_block(long token, long end, long d0, const float* bias, const float* sums) const {
    const long n = smaller(L, in_.D - d0);
    if (n == L && in_.x.strides.d == 1 && is_interior<W>(rows_.get(), token, M, end)) {
      const int64_t stride = in_.x.strides.t;
      const bf16* x = token_at<bf16>(in_.x, in_, rows_.get()[token], token) + d0;
      bf16* y = static_cast<bf16*>(p_.y) + token * in_.D + d0;
      Floats inputs[W];  // of the last W tokens
#pragma GCC unroll 4
      for (int w = 0; w < W - 1; ++w) inputs[w] = load(x + (w - (W - 1)) * stride);
#pragma GCC unroll 4
      for (long i = 0; i < M; ++i) {
        inputs[W - 1] = load(x + i * stride);
        store(y + i * in_.D, activate(convolve(inputs, sums + i * W * L, bias)));
#pragma GCC unroll 4
        for (int w = 0; w < W - 1; ++w) inputs[w] = inputs[w + 1];
      }
      return;
    }
    for (long i = 0; i < M && token + i < end; ++i) {
      Floats inputs[W];
      for (int w = 0; w < W; ++w) inputs[w] = tap_input<bf16, W>(in_, rows_.get()[token + i], token + i, w, d0, n);
      store_some(static_cast<bf16*>(p_.y) + (token + i) * in_.D + d0, 1, n,
                 activate(convolve(inputs, sums + i * W * L, bias)));
    }
  }

  JET_INLINE Floats convolve(const Floats (&inputs)[W], const float* sums, const float* bias) const {
    Floats z{};
#pragma GCC unroll 4
    for (int w = W - 1; w >= 0; --w) z += (load(sums + w * L) + load(bias + w * L)) * inputs[w];
    return z;
  }

  JET_INLINE Floats activate(Floats z) const { return in_.silu ? silu(z) : z; }

  const DynamicConvParams& p_;
  const ConvInputs& in_;
  long steps_, panel_units_;
  Buffer<Row> rows_;
};

}  // namespace jet::cpu::JET_CPU_ISA

#endif
