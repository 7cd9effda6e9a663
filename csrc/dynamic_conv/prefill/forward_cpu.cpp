// Forward: the generator's GEMM, tile by tile, with the convolution as its epilogue in registers.
//
// A task owns the channels of one cache line of y: it packs their rows of weight once (about 100 KB at R = 384, L2) and
// streams all packed hidden rows past them.
#include "csrc/dynamic_conv/prefill/dynamic_conv.h"

#include "csrc/dynamic_conv/prefill/forward_tiles_cpu.h"
#include "csrc/dynamic_conv/product_cpu.h"
#include "csrc/dynamic_conv/rows_cpu.h"

namespace jet::cpu::JET_CPU_ISA {
namespace {

constexpr long kBlockTokens = 4096;  // hidden of a block (6 MB at R = 384, fp32) stays in L3 while the panels pass

template <class P, class T, int W>
class Forward {
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  using Vec = Vector<Acc>;
  static constexpr int L = kLanes<T>;
  static constexpr int M = kAccumulators / W;                                         // tokens of a tile
  static constexpr int G = L * int(sizeof(T)) >= 64 ? 1 : 64 / (L * int(sizeof(T)));  // panels of a task

 public:
  explicit Forward(const DynamicConvParams& p)
      : p_(p), in_(p.in), generator_(p.generator), steps_(units_for(generator_.R, P::terms)), rows_(in_.B * in_.T) {
    fill_rows(in_, rows_.get());
  }

  void run(const Parallel& parallel) {
    const long tokens = in_.B * in_.T, panels = (in_.D + L - 1) / L, groups = (panels + G - 1) / G;
    const auto write_state = [&](long n) { write_conv_state(in_, n, static_cast<T*>(p_.conv_state_out)); };
    if (tokens == 0 || groups == 0) {
      for (long n = 0; n < in_.N; ++n) write_state(n);
      return;
    }
    const long block = smaller(tokens, kBlockTokens), slots = larger(1, parallel.threads);
    // Few channels: tasks get fewer tokens instead, at the price of packing the panels several times.
    const long parts = groups >= 4 * slots ? 1 : larger(1, smaller(4 * slots / groups, block / 256));
    const long tiles = (block + M - 1) / M, part_tiles = (tiles + parts - 1) / parts;
    Buffer<Unit> hidden(tiles * M * steps_), panel(slots * G * panel_units());
    for (long begin = 0; begin < tokens; begin += block) {
      const long end = smaller(tokens, begin + block), block_tiles = (end - begin + M - 1) / M;
      const long states = begin == 0 ? in_.N : 0;
      const Parallel packing = for_work(parallel, kCopy * ((end - begin) * generator_.R + states * in_.D * (W - 1)));
      run_tasks(packing, slots, states + (block_tiles + 15) / 16, [&](long, long task) {
        if (task < states) return write_state(task);
        const long first = (task - states) * 16;
        for (long i = first; i < smaller(block_tiles, first + 16); ++i)
          pack_tile(begin + i * M, end, hidden.get() + i * M * steps_);
      });
      run_tasks(parallel, slots, groups * parts, [&](long slot, long task) {
        const long first = task % parts * part_tiles;
        run_group(task / parts * G, begin, end, first, smaller(block_tiles, first + part_tiles), hidden.get(),
                  panel.get() + slot * G * panel_units());
      });
    }
  }

 private:
  long panel_units() const { return round_up(steps_ * W * L, 64); }

  void pack_tile(long token, long end, Unit* tile) const {
    for (long i = 0; i < M; ++i) {
      if (token + i < end)
        pack_tile_row<P>(token_at<T>(generator_.hidden, in_, rows_.get()[token + i], token + i),
                         generator_.hidden.strides.d, generator_.R, i, M, tile);
      else
        for (long s = 0; s < steps_; ++s) tile[s * M + i] = Unit{};
    }
  }

  void run_group(long panel0, long begin, long end, long first_tile, long last_tile, const Unit* hidden,
                 Unit* packed) const {
    alignas(64) Acc bias[G][W * L];
    for (int g = 0; g < G; ++g) {
      const long d0 = (panel0 + g) * L, n = smaller(L, in_.D - d0);
      if (n <= 0) continue;
      pack_weight_panel<P, T, W>(static_cast<const T*>(generator_.weight), generator_.R, d0, n,
                                 packed + g * panel_units());
      pack_bias_panel<T, W>(static_cast<const T*>(generator_.bias), d0, n, bias[g]);
    }
    for (long i = first_tile; i < last_tile; ++i) {
      const long token = begin + i * M;
      const bool interior = is_interior<W>(rows_.get(), token, M, end) && in_.x.strides.d == 1;
      for (int g = 0; g < G; ++g) {
        const long d0 = (panel0 + g) * L, n = smaller(L, in_.D - d0);
        if (n <= 0) continue;
        const Unit* a = hidden + i * M * steps_;
        const Unit* b = packed + g * panel_units();
        if (interior && n == L)
          interior_tile(token, d0, a, b, bias[g]);
        else
          edge_tile(token, end, d0, n, a, b, bias[g]);
      }
    }
  }

  // taps [M, W] vectors = bias + hidden weight^T
  JET_INLINE void generate(Tile<Acc, M, W>& taps, const Unit* a, const Unit* b, const Acc* bias) const {
    taps.load(bias, 0);
    taps.add_product(a, 1, M, b, W * L, steps_);
  }

  void interior_tile(long token, long d0, const Unit* a, const Unit* b, const Acc* bias) const {
    const int64_t stride = in_.x.strides.t;
    const T* x = token_at<T>(in_.x, in_, rows_.get()[token], token) + d0;
    T* y = static_cast<T*>(p_.y) + token * in_.D + d0;
    for (int i = 0; i < M; ++i) {  // a new page per row: fetched while the product runs
      __builtin_prefetch(x + i * stride);
      __builtin_prefetch(y + i * in_.D, 1);
    }
    Tile<Acc, M, W> taps;
    generate(taps, a, b, bias);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      Vec z = taps.acc[i][W - 1] * load(x + i * stride);
#pragma GCC unroll 4
      for (int w = 0; w < W - 1; ++w) z += taps.acc[i][w] * load(x + (i - (W - 1) + w) * stride);
      store(y + i * in_.D, in_.silu ? silu(z) : z);
    }
  }

  void edge_tile(long token, long end, long d0, long n, const Unit* a, const Unit* b, const Acc* bias) const {
    Tile<Acc, M, W> tile;
    generate(tile, a, b, bias);
    alignas(64) Acc taps[M * W * L];
    tile.store(taps, W * L);
    for (long i = 0; i < M && token + i < end; ++i) {
      Vec z{};
      for (int w = W - 1; w >= 0; --w)
        z +=
            Simd<Acc>::load(taps + (i * W + w) * L) * tap_input<T, W>(in_, rows_.get()[token + i], token + i, w, d0, n);
      store_some(static_cast<T*>(p_.y) + (token + i) * in_.D + d0, 1, n, in_.silu ? silu(z) : z);
    }
  }

  const DynamicConvParams& p_;
  const ConvInputs& in_;
  const TapGenerator& generator_;
  long steps_;
  Buffer<Row> rows_;
};

}  // namespace

void dynamic_conv_cpu(const DynamicConvParams& p, const Parallel& caller) {
  const Parallel parallel = for_work(caller, conv_work(p.in, p.generator));
#if defined(__AVX512F__)
  if (tile_forward_takes(p)) return with_taps(p.in.W, [&](auto taps) { TileForward<taps>(p).run(parallel); });
#endif
  with_product(p.in, true, [&](auto types, auto taps) {
    using Types = decltype(types);
    Forward<typename Types::Product, typename Types::Element, taps>(p).run(parallel);
  });
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(dynamic_conv_cpu, DynamicConvParams, params.in.x.dtype)
