// The taps of a step in the tile registers of AMX: 16 rows of weight, as they stream in from memory, times the pairs of
// 16 tokens.
//
//   sums [16 W, 32] = weight [16 W, R] hidden^T [R, 32]     of 16 channels and up to 32 tokens; row c W + w is tap w of
//                                                           channel c
#pragma once

#include "csrc/cpu/amx.h"
#include "csrc/dynamic_conv/product_cpu.h"
#include "csrc/dynamic_conv/step/window_cpu.h"

#if defined(__AVX512F__)

namespace jet::cpu::JET_CPU_ISA {

inline bool tile_step_takes(const DynamicConvStepParams& p) {
  return p.in.x.dtype == Dtype::bf16 && p.generator.R % kTileColumns == 0 && p.in.D % kTileSide == 0 &&
         amx_bf16_is_active();
}

template <int W>
class TileStep {
  static constexpr long L = kTileSide;      // channels of a panel, tokens of a block
  static constexpr long kTokens = 2 * L;    // whose sums are made at a time
  static constexpr long kPanelsOfTask = 4;  // neighbours share lines of the states

 public:
  // hidden [N, R], contiguous
  TileStep(const DynamicConvStepParams& p, const bf16* hidden)
      : p_(p), hidden_(hidden), N_(p.in.N), R_(p.generator.R), steps_(R_ / kTileColumns) {}

  void run(const Parallel& parallel) const {
    const long blocks = (N_ + L - 1) / L, panels = p_.in.D / L, slots = larger(1, parallel.threads);
    const long of_task = larger(1, smaller(kPanelsOfTask, panels / (4 * slots)));
    Buffer<uint32_t> pairs(blocks * steps_ * kTileSums);
    for (long block = 0; block < blocks; ++block) pack_block(block, pairs.get() + block * steps_ * kTileSums);
    run_tasks(parallel, slots, (panels + of_task - 1) / of_task, [&](long, long task) {
      const WholeTiles tiles;
      for (long step = 0; step < steps_; ++step)
        prefetch_lines<4>(reinterpret_cast<const char*>(weight_of(task * of_task * L)), step);
      for (long panel = task * of_task; panel < smaller((task + 1) * of_task, panels); ++panel)
        run_panel(panel * L, pairs.get());
    });
  }

 private:
  // pairs[step][pair][token]; tokens that are not there are zero.
  void pack_block(long block, uint32_t* pairs) const {
    for (long step = 0; step < steps_; ++step) {
      Words x[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) {
        const long n = block * L + i;
        x[i] = n < N_ ? Bf16Product::load_units(hidden_ + n * R_ + step * kTileColumns, 1, kTileColumns) : Words{};
      }
      transpose_in_registers(x);
#pragma GCC unroll 16
      for (int j = 0; j < L; ++j) Simd<uint32_t>::store(pairs + step * kTileSums + j * L, x[j]);
    }
  }

  const bf16* weight_of(long d0) const { return static_cast<const bf16*>(p_.generator.weight) + d0 * W * R_; }

  void run_panel(long d0, const uint32_t* pairs) const {
    alignas(64) float sums[W * L * kTokens], bias[W * L];
    prefetch_windows(d0);
    pack_bias_panel<bf16, W>(static_cast<const bf16*>(p_.generator.bias), d0, L, bias);
    const bf16* weight = weight_of(d0);
    for (long row = 0; row < N_; row += kTokens) {
      const uint32_t* of_row = pairs + row * steps_ * L;
      if (N_ - row > L)
        multiply_rows<2>(weight, of_row, sums);
      else
        multiply_rows<1>(weight, of_row, sums);
      for (long first = row; first < smaller(row + kTokens, N_); first += L)
        convolve_block(d0, first, sums + (first - row), bias);
    }
  }

  // States and inputs arrive while the sums are made.
  void prefetch_windows(long d0) const {
    const ConvStateStrides& strides = p_.pool.strides;
    for (long n = 0; n < N_; ++n) {
      const long s = row_of(p_.pool, n);
      if (s < 0) continue;
      const char* state =
          reinterpret_cast<const char*>(static_cast<const bf16*>(p_.pool.data) + s * strides.n + d0 * strides.d);
      __builtin_prefetch(state, 1);
      __builtin_prefetch(state + 64, 1);
      __builtin_prefetch(at<bf16>(p_.in.x, n, 0) + d0 * p_.in.x.strides.d);
    }
  }

  template <int blocks>
  void multiply_rows(const bf16* weight, const uint32_t* pairs, float* sums) const {
#pragma GCC unroll 2
    for (int w = 0; w + 2 <= W; w += 2) multiply<2, blocks>(weight + w * L * R_, pairs, sums + w * L * kTokens);
    if constexpr (W % 2 != 0) multiply<1, blocks>(weight + (W - 1) * L * R_, pairs, sums + (W - 1) * L * kTokens);
  }

  // Into the L2, from where tiles are loaded: at a row's distance the hardware foresees nothing. Step `step` of steps_
  // asks for `lines` lines in each of eight streams side by side, which get more from memory than one.
  template <long lines>
  JET_INLINE void prefetch_lines(const char* from, long step) const {
    from += step * lines * kTileBytes;
    for (long i = 0; i < lines; ++i, from += kTileBytes)
#pragma GCC unroll 8
      for (long stream = 0; stream < 8; ++stream) __builtin_prefetch(from + stream * steps_ * lines * kTileBytes, 0, 2);
  }

  // sums [16 tiles, 16 blocks]: `tiles` of rows in registers 4 and 5, `blocks` of tokens in 6 and 7
  template <int tiles, int blocks>
  void multiply(const bf16* weight, const uint32_t* pairs, float* sums) const {
    const long row_bytes = R_ * long(sizeof(bf16)), block = steps_ * kTileSums;
    const char* ahead = reinterpret_cast<const char*>(weight + tiles * L * R_);  // as many bytes as are multiplied
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    for (long step = 0; step < steps_; ++step, weight += kTileColumns, pairs += kTileSums) {
      prefetch_lines<tiles * 2>(ahead, step);
      tile_load<6>(pairs, kTileBytes);
      if constexpr (blocks == 2) tile_load<7>(pairs + block, kTileBytes);
      tile_load<4>(weight, row_bytes);
      tile_multiply_add<0, 4, 6>();
      if constexpr (blocks == 2) tile_multiply_add<1, 4, 7>();
      if constexpr (tiles == 2) {
        tile_load<5>(weight + L * R_, row_bytes);
        tile_multiply_add<2, 5, 6>();
        if constexpr (blocks == 2) tile_multiply_add<3, 5, 7>();
      }
    }
    constexpr long ld = kTokens * sizeof(float);
    tile_store<0>(sums, ld);
    if constexpr (blocks == 2) tile_store<1>(sums + L, ld);
    if constexpr (tiles == 2) tile_store<2>(sums + L * kTokens, ld);
    if constexpr (tiles == 2 && blocks == 2) tile_store<3>(sums + L * kTokens + L, ld);
  }

  // The tokens from `first` on, whose sums are columns of `sums`.
  void convolve_block(long d0, long first, const float* sums, const float* bias) const {
    alignas(64) float taps[L * W * L];
    for (int w = 0; w < W; ++w) {
      Floats x[L];
#pragma GCC unroll 16
      for (int c = 0; c < L; ++c) x[c] = load(sums + (c * W + w) * kTokens);
      transpose_in_registers(x);
      const Floats of_tap = load(bias + w * L);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) store(taps + (i * W + w) * L, x[i] + of_tap);
    }
    for (long i = 0; i < smaller(L, N_ - first); ++i) convolve_step<bf16, W>(p_, first + i, d0, L, taps + i * W * L);
  }

  const DynamicConvStepParams& p_;
  const bf16* hidden_;
  long N_, R_, steps_;
};

}  // namespace jet::cpu::JET_CPU_ISA

#endif
