// One token per sequence: the weight of the generator is streamed from memory once, and the taps are convolved in
// registers.
#include "csrc/dynamic_conv/step/dynamic_conv_step.h"

#include "csrc/dynamic_conv/product_cpu.h"
#include "csrc/dynamic_conv/step/window_cpu.h"

namespace jet::cpu::JET_CPU_ISA {
namespace {

// Up to this many sequences a dot product per row of weight, straight from memory, beats packing the weight first.
constexpr long kDirectRows = 12;

template <class P, class T, int W>
class Step {
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  using Vec = Vector<Acc>;
  static constexpr int L = kLanes<T>;
  static constexpr int M = kAccumulators / W;  // sequences of a tile

 public:
  explicit Step(const DynamicConvStepParams& p)
      : p_(p),
        in_(p.in),
        generator_(p.generator),
        steps_(units_for(generator_.R, P::terms)),
        padded_steps_(round_up(steps_, L)),
        direct_(in_.N <= kDirectRows) {}

  void run(const Parallel& parallel) {
    const long tiles = (in_.N + M - 1) / M, panels = (in_.D + L - 1) / L, slots = larger(1, parallel.threads);
    Buffer<Unit> hidden(tiles * M * padded_steps_), panel(direct_ ? 0 : slots * W * L * padded_steps_);
    run_tasks(for_work(parallel, kCopy * in_.N * generator_.R), direct_ ? 1 : slots, tiles,
              [&](long, long i) { pack_hidden(i * M, hidden.get() + i * M * padded_steps_); });
    run_tasks(parallel, slots, panels, [&](long slot, long task) {
      run_panel(task * L, hidden.get(), panel.get() + slot * W * L * padded_steps_);
    });
  }

 private:
  // direct: row i of the tile in consecutive units; else tile[step][i] as the register tile reads it
  void pack_hidden(long row, Unit* tile) const {
    for (long i = 0; i < M && row + i < in_.N; ++i) {
      const T* hidden = at<T>(generator_.hidden, row + i, 0);
      const int64_t stride = generator_.hidden.strides.d;
      if (direct_)
        for (long s = 0; s < padded_steps_; s += L) {
          const long r = s * P::terms;
          Simd<Unit>::store(tile + i * padded_steps_ + s, P::load_units(hidden + r * stride, stride, generator_.R - r));
        }
      else
        pack_tile_row<P>(hidden, stride, generator_.R, i, M, tile);
    }
    if (!direct_)
      for (long i = larger(0, in_.N - row); i < M; ++i)
        for (long s = 0; s < steps_; ++s) tile[s * M + i] = Unit{};
  }

  void run_panel(long d0, const Unit* hidden, Unit* packed) const {
    const long n = smaller(L, in_.D - d0);
    alignas(64) Acc bias[W * L], taps[M * W * L];
    pack_bias_panel<T, W>(static_cast<const T*>(generator_.bias), d0, n, bias);
    if (!direct_) pack_weight_panel<P, T, W>(static_cast<const T*>(generator_.weight), generator_.R, d0, n, packed);
    for (long row = 0; row < in_.N; row += M) {
      const Unit* tile = hidden + row * padded_steps_;
      if (direct_)
        generate_direct(d0, n, tile, smaller(M, in_.N - row), bias, taps);
      else
        generate(tile, packed, bias, taps);
      for (long i = 0; i < M && row + i < in_.N; ++i) convolve_step<T, W>(p_, row + i, d0, n, taps + i * W * L);
    }
  }

  void generate(const Unit* tile, const Unit* packed, const Acc* bias, Acc* taps) const {
    Tile<Acc, M, W> acc;
    acc.load(bias, 0);
    acc.add_product(tile, 1, M, packed, W * L, steps_);
    acc.store(taps, W * L);
  }

  void generate_direct(long d0, long n, const Unit* tile, long rows, const Acc* bias, Acc* taps) const {
    for (long c = 0; c < n; ++c) {
      const T* weight = static_cast<const T*>(generator_.weight) + (d0 + c) * W * generator_.R;
      for_row_blocks(0, rows, [&](auto count, long i) {
        dot_products<decltype(count)::value>(weight, tile + i * padded_steps_, bias + c, taps + i * W * L + c);
      });
    }
  }

  // taps[i][w] of one channel for C rows of hidden
  template <int C>
  void dot_products(const T* weight, const Unit* hidden, const Acc* bias, Acc* taps) const {
    Vec acc[W][C];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w)
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i) acc[w][i] = Vec{};
    for (long s = 0; s < steps_; s += L) {
      const long r = s * P::terms;
      Vector<Unit> row[W];
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        __builtin_prefetch(weight + (W + w) * generator_.R + r);  // the next channel
        row[w] = P::load_units(weight + w * generator_.R + r, 1, generator_.R - r);
      }
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i) {
        const Vector<Unit> h = Simd<Unit>::load(hidden + i * padded_steps_ + s);
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) acc[w][i] = multiply_add(row[w], h, acc[w][i]);
      }
    }
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w)
#pragma GCC unroll 8
      for (int i = 0; i < C; ++i) taps[(i * W + w) * L] = bias[w * L] + horizontal_sum<Acc>(acc[w][i]);
  }

  const DynamicConvStepParams& p_;
  const ConvInputs& in_;
  const TapGenerator& generator_;
  long steps_, padded_steps_;
  bool direct_;
};

}  // namespace

void dynamic_conv_step_cpu(const DynamicConvStepParams& p, const Parallel& parallel) {
  with_product(p.in, true, [&](auto types, auto taps) {
    using Types = decltype(types);
    const double work = double(p.in.N) * p.in.D * p.in.W * (p.generator.R + kCopy);
    Step<typename Types::Product, typename Types::Element, taps>(p).run(for_work(parallel, work));
  });
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(dynamic_conv_step_cpu, DynamicConvStepParams, params.in.x.dtype)
