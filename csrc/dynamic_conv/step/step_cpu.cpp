// One token per sequence: the generator is streamed from memory once, and its kernels meet the state in registers.
#include "csrc/dynamic_conv/step/dynamic_conv_step.h"

#include "csrc/cpu/isa.h"
#include "csrc/dynamic_conv/product_cpu.h"
#include "csrc/dynamic_conv/rows_cpu.h"

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
      : p_(p), steps_(units_for(p.R, P::terms)), padded_steps_(round_up(steps_, L)), direct_(p.N <= kDirectRows) {}

  void run(const Parallel& parallel) {
    const long tiles = (p_.N + M - 1) / M, panels = (p_.D + L - 1) / L, slots = larger(1, parallel.threads);
    Buffer<Unit> hidden(tiles * M * padded_steps_), panel(direct_ ? 0 : slots * W * L * padded_steps_);
    run_tasks(for_work(parallel, kCopy * p_.N * p_.R), direct_ ? 1 : slots, tiles,
              [&](long, long i) { pack_hidden(i * M, hidden.get() + i * M * padded_steps_); });
    run_tasks(parallel, slots, panels, [&](long slot, long task) {
      run_panel(task * L, hidden.get(), panel.get() + slot * W * L * padded_steps_);
    });
  }

 private:
  // direct: row i of the tile in consecutive units; else tile[step][i] as the register tile reads it
  void pack_hidden(long row, Unit* tile) const {
    for (long i = 0; i < M && row + i < p_.N; ++i) {
      const T* hidden = static_cast<const T*>(p_.hidden) + (row + i) * p_.hidden_stride[0];
      const int64_t stride = p_.hidden_stride[1];
      if (direct_)
        for (long s = 0; s < padded_steps_; s += L) {
          const long r = s * P::terms;
          Simd<Unit>::store(tile + i * padded_steps_ + s, P::load_units(hidden + r * stride, stride, p_.R - r));
        }
      else
        pack_tile_row<P>(hidden, stride, p_.R, i, M, tile);
    }
    if (!direct_)
      for (long i = larger(0, p_.N - row); i < M; ++i)
        for (long s = 0; s < steps_; ++s) tile[s * M + i] = Unit{};
  }

  void run_panel(long d0, const Unit* hidden, Unit* packed) const {
    const long n = smaller(L, p_.D - d0);
    alignas(64) Acc bias[W * L], kernel[M * W * L];
    pack_bias_panel<T, W>(static_cast<const T*>(p_.bias), d0, n, bias);
    if (!direct_) pack_weight_panel<P, T, W>(static_cast<const T*>(p_.weight), p_.R, d0, n, packed);
    for (long row = 0; row < p_.N; row += M) {
      const Unit* tile = hidden + row * padded_steps_;
      if (direct_)
        generate_direct(d0, n, tile, smaller(M, p_.N - row), bias, kernel);
      else
        generate(tile, packed, bias, kernel);
      for (long i = 0; i < M && row + i < p_.N; ++i) finish_row(row + i, d0, n, kernel + i * W * L);
    }
  }

  void generate(const Unit* tile, const Unit* packed, const Acc* bias, Acc* kernel) const {
    Tile<Acc, M, W> acc;
    acc.load(bias, 0);
    acc.add_product(tile, 1, M, packed, W * L, steps_);
    acc.store(kernel, W * L);
  }

  void generate_direct(long d0, long n, const Unit* tile, long rows, const Acc* bias, Acc* kernel) const {
    for (long c = 0; c < n; ++c) {
      const T* weight = static_cast<const T*>(p_.weight) + (d0 + c) * W * p_.R;
      for_row_blocks(0, rows, [&](auto count, long i) {
        dot_products<decltype(count)::value>(weight, tile + i * padded_steps_, bias + c, kernel + i * W * L + c);
      });
    }
  }

  // kernel[i][w] of one channel for C rows of hidden
  template <int C>
  void dot_products(const T* weight, const Unit* hidden, const Acc* bias, Acc* kernel) const {
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
        __builtin_prefetch(weight + (W + w) * p_.R + r);  // the next channel
        row[w] = P::load_units(weight + w * p_.R + r, 1, p_.R - r);
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
      for (int i = 0; i < C; ++i) kernel[(i * W + w) * L] = bias[w * L] + horizontal_sum<Acc>(acc[w][i]);
  }

  void finish_row(long row, long d0, long n, const Acc* kernel) const {
    T* y = static_cast<T*>(p_.y) + row * p_.D + d0;
    const int64_t s = p_.state_rows ? static_cast<const int64_t*>(p_.state_rows)[row] : row;
    if (s < 0) return store_some(y, 1, n, Vec{});
    const T* x = static_cast<const T*>(p_.x) + row * p_.x_stride[0] + d0 * p_.x_stride[1];
    T* state = static_cast<T*>(p_.conv_state) + s * p_.state_stride[0] + d0 * p_.state_stride[1];
    T inputs[W][L] = {};  // tap by tap
    const bool packed = n == L && p_.state_stride[1] == W - 1 && p_.state_stride[2] == 1 && p_.x_stride[1] == 1;
    if (packed)
      read_inputs(x, 1, state, W - 1, 1, L, inputs), shift(state, W - 1, 1, L, inputs);
    else
      read_inputs(x, p_.x_stride[1], state, p_.state_stride[1], p_.state_stride[2], n, inputs),
          shift(state, p_.state_stride[1], p_.state_stride[2], n, inputs);
    Vec z{};
    for (int w = W - 1; w >= 0; --w) z += Simd<Acc>::load(kernel + w * L) * load(inputs[w]);
    store_some(y, 1, n, p_.silu ? silu(z) : z);
  }

  static JET_INLINE void read_inputs(const T* x, long x_stride, const T* state, long channel, long tap, long n,
                                     T (&inputs)[W][L]) {
    for (int w = 0; w < W - 1; ++w)
      for (long c = 0; c < n; ++c) inputs[w][c] = state[c * channel + w * tap];
    for (long c = 0; c < n; ++c) inputs[W - 1][c] = x[c * x_stride];
  }

  static JET_INLINE void shift(T* state, long channel, long tap, long n, const T (&inputs)[W][L]) {
    for (long c = 0; c < n; ++c)
      for (int w = 0; w < W - 1; ++w) state[c * channel + w * tap] = inputs[w + 1][c];
  }

  const DynamicConvStepParams& p_;
  long steps_, padded_steps_;
  bool direct_;
};

template <class P, class T>
void step(const DynamicConvStepParams& p, const Parallel& caller) {
  const Parallel parallel = for_work(caller, double(p.N) * p.D * p.W * (p.R + kCopy));
  switch (p.W) {
    case 2: return Step<P, T, 2>(p).run(parallel);
    case 3: return Step<P, T, 3>(p).run(parallel);
    case 4: return Step<P, T, 4>(p).run(parallel);
  }
}

}  // namespace

void dynamic_conv_step_cpu(const DynamicConvStepParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case Dtype::f32: return step<PlainProduct<float>, float>(p, parallel);
    case Dtype::f64: JET_CPU_FP64(step<PlainProduct<double>, double>(p, parallel));
    case Dtype::f16: return step<PlainProduct<float>, f16>(p, parallel);
    case Dtype::bf16:
#if defined(__AVX512F__)
      if (has_bf16_instructions()) return step<Bf16Product, bf16>(p, parallel);
#endif
      return step<PlainProduct<float>, bf16>(p, parallel);
  }
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(dynamic_conv_step_cpu, DynamicConvStepParams, params.dtype)
