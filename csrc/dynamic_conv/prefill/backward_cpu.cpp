// Backward, a block of tokens at a time, in two parallel loops:
//
//   over panels of channels: generate the taps again, form dtaps, dx, dbias, and dweight += dtaps^T hidden
//   over columns of hidden:  dhidden = dtaps weight; and hidden of the next block is packed
//
// The dtaps of a block is all that passes between them. Each sum is taken by one task in the order of the tokens, so
// results do not depend on the number of threads.
#include "csrc/dynamic_conv/prefill/dynamic_conv.h"
#include "csrc/dynamic_conv/product_cpu.h"
#include "csrc/dynamic_conv/state_gradient_cpu.h"

namespace jet::cpu::JET_CPU_ISA {
namespace {

// Multiples of every tile height (24 = lcm(6, 8, 12)). Longer blocks load and store dweight less often, shorter ones
// keep dtaps (26 MB at D*W = 12288, fp32) in L3.
constexpr long kBlockTokens = 528;
constexpr long kChunkTokens = kBlockTokens / 2;  // of one dhidden task

template <class P, class T, int W>
class Backward {
  using Acc = typename P::Acc;
  using Unit = typename P::Unit;
  using Number = typename P::Number;
  using Vec = Vector<Acc>;
  static constexpr int L = kLanes<T>, K = W - 1, terms = P::terms;
  static constexpr int M = kAccumulators / W;                                         // tokens of a tile of taps
  static constexpr int G = L * int(sizeof(T)) >= 64 ? 1 : 64 / (L * int(sizeof(T)));  // panels to a cache line of dx
  static constexpr int MW =
      L < kAccumulators / 3 ? L : kAccumulators / 3;          // rows of a dweight tile: channels of one tap
  static constexpr int VW = MW * 3 == kAccumulators ? 3 : 4;  // vectors of a dweight tile
  static constexpr int MH = 6, VH = kAccumulators / MH;       // dhidden tile
  static constexpr long kPanelsAtOnce = 6;                    // 6 panels x 64 rows x 64 columns of weight: 98 KB of L2
  static constexpr bool kDirect = sizeof(T) == sizeof(Acc);   // dweight accumulates where it is returned

 public:
  explicit Backward(const DynamicConvBackwardParams& p, const Parallel& parallel)
      : p_(p),
        in_(p.in),
        generator_(p.generator),
        parallel_(parallel),
        slots_(larger(1, parallel.threads)),
        tokens_(in_.B * in_.T),
        block_(round_up(smaller(larger(tokens_, 1), kBlockTokens), 24)),
        steps_(units_for(generator_.R, terms)),
        panels_((in_.D + L - 1) / L),
        weight_columns_((generator_.R + VW * L - 1) / (VW * L)),
        hidden_columns_((generator_.R + VH * L - 1) / (VH * L)),
        rows_(tokens_),
        tiles_(block_ * steps_),
        columns_(weight_columns_ * block_ / terms * VW * L),
        dtaps_(panels_ * block_ * W * L),
        dhidden_(block_ * hidden_columns_ * VH * L),
        dweight_(kDirect ? 0 : in_.D * W * generator_.R),
        dbias_(panels_ * W * L),
        halo_(panels_ * K * L),
        dstate_(in_.N * in_.D * K),
        panel_scratch_(slots_ * panel_units()),
        dx_scratch_(slots_ * (block_ + K) * L),
        pair_scratch_(terms > 1 ? slots_ * block_ / terms * W * L : 0),
        weight_(hidden_columns_ * panels_ * W * L / terms * VH * L) {
    fill_rows(in_, rows_.get());
  }

  void run() {
    const long weights = hidden_columns_ * panels_, first_end = smaller(tokens_, block_);
    run_tasks(parallel_, slots_, weights + hidden_tasks(0, first_end), [&](long, long task) {
      if (task < weights)
        pack_weight_columns(task / panels_, task % panels_, weight_.get() + task * W * L / terms * VH * L);
      else
        pack_hidden(0, first_end, task - weights);
    });
    long begin = 0, end = first_end;
    do {  // once even for no tokens, whose gradients are zero
      run_tasks(parallel_, slots_, (panels_ + G - 1) / G, [&](long slot, long task) {
        for (long panel = task * G; panel < smaller(panels_, task * G + G); ++panel) run_panel(slot, panel, begin, end);
      });
      const long chunks = (end - begin + kChunkTokens - 1) / kChunkTokens, columns = hidden_columns_ * chunks;
      const long next = smaller(tokens_, end + block_);
      run_tasks(parallel_, slots_, columns + hidden_tasks(end, next), [&](long, long task) {
        if (task >= columns) return pack_hidden(end, next, task - columns);
        const long first = task % chunks * kChunkTokens;
        run_columns(task / chunks, begin, first, smaller(end - begin, first + kChunkTokens));
      });
      begin = end, end = next;
    } while (begin < tokens_);
  }

 private:
  long panel_units() const { return round_up(steps_ * W * L, 64); }
  Acc* dweight() const { return kDirect ? static_cast<Acc*>(p_.dweight) : dweight_.get(); }
  Number* dtaps_row(long panel, long i) const { return dtaps_.get() + (panel * block_ + i) * W * L; }
  const T* hidden_row(long token) const { return token_at<T>(generator_.hidden, in_, rows_.get()[token], token); }

  // hidden of tokens [begin, end), twice: tile by tile for the taps (as in the forward), and by columns [t][r] for
  // dweight.
  long hidden_tiles(long begin, long end) const { return (end - begin + M - 1) / M; }
  long hidden_tasks(long begin, long end) const { return end > begin ? hidden_tiles(begin, end) + weight_columns_ : 0; }

  void pack_hidden(long begin, long end, long task) const {
    const long tiles = hidden_tiles(begin, end);
    if (task < tiles)
      pack_hidden_tile(begin + task * M, end, tiles_.get() + task * M * steps_);
    else
      pack_hidden_columns(begin, end, task - tiles);
  }

  void pack_hidden_tile(long token, long end, Unit* tile) const {
    for (long i = 0; i < M; ++i)
      if (token + i < end)
        pack_tile_row<P>(hidden_row(token + i), generator_.hidden.strides.d, generator_.R, i, M, tile);
      else
        for (long s = 0; s < steps_; ++s) tile[s * M + i] = Unit{};
  }

  void pack_hidden_columns(long begin, long end, long j) const {
    const int64_t stride = generator_.hidden.strides.d;
    Unit* out = columns_.get() + j * (block_ / terms) * VW * L;
    for (long token = begin; token < end; token += terms)
      for (int v = 0; v < VW; ++v, out += L) {
        const long r = (j * VW + v) * L;
        const T* rows[terms];
        for (int i = 0; i < terms; ++i)
          rows[i] = token + i < end && r < generator_.R ? hidden_row(token + i) + r * stride : nullptr;
        Simd<Unit>::store(out, P::combine(rows, stride, generator_.R - r));
      }
  }

  void run_panel(long slot, long panel, long begin, long end) const {
    const long d0 = panel * L, n = smaller(L, in_.D - d0);
    Unit* packed = panel_scratch_.get() + slot * panel_units();
    Acc* dx = dx_scratch_.get() + slot * (block_ + K) * L;  // row j belongs to token begin - (W-1) + j
    alignas(64) Acc bias[W * L], taps[M * W * L];
    pack_weight_panel<P, T, W>(static_cast<const T*>(generator_.weight), generator_.R, d0, n, packed);
    pack_bias_panel<T, W>(static_cast<const T*>(generator_.bias), d0, n, bias);
    Acc* halo = halo_.get() + panel * K * L;
    if (begin == 0) start_panel(panel, d0, n);
    for (long j = 0; j < (end - begin + K) * L; ++j) dx[j] = j < K * L ? halo[j] : Acc(0);
    for (long token = begin; token < end; token += M) {
      prefetch_rows(token, end, d0);
      generate(tiles_.get() + (token - begin) * steps_, packed, bias, taps);
      Vec dbias[W] = {};
      for (long i = 0; i < M && token + i < end; ++i)
        differentiate_row(token + i, d0, n, taps + i * W * L, dbias, dtaps_row(panel, token + i - begin),
                          dx + (token + i - begin) * L);
      for (int w = 0; w < W; ++w) {
        Acc* sum = dbias_.get() + (panel * W + w) * L;
        Simd<Acc>::store(sum, Simd<Acc>::load(sum) + dbias[w]);
      }
    }
    for (long i = end - begin; i % terms; ++i)
      for (int j = 0; j < W * L; ++j) dtaps_row(panel, i)[j] = Number{};
    const long complete = end == tokens_ ? end : end - K;
    for (long token = larger(0, begin - K); token < complete; ++token)
      write_dx(token, d0, n, dx + (token - begin + K) * L);
    for (long j = 0; j < K * L; ++j) halo[j] = dx[(end - begin) * L + j];
    add_dweight(slot, panel, d0, n, begin, end);
    if (end == tokens_) finish_panel(panel, d0, n);
  }

  Acc* dstate(long sequence, long d0) const { return dstate_.get() + (sequence * in_.D + d0) * K; }

  void start_panel(long panel, long d0, long n) const {
    for (long i = 0; i < W * L; ++i) dbias_.get()[panel * W * L + i] = 0;
    for (long i = 0; i < K * L; ++i) halo_.get()[panel * K * L + i] = 0;
    for (int64_t sequence = 0; sequence < in_.N; ++sequence)
      start_state_gradient<T>(in_, static_cast<const T*>(p_.grad_conv_state_out), sequence, d0, n,
                              dstate(sequence, d0));
  }

  // What was summed up over all tokens, in the dtype that is returned.
  void finish_panel(long panel, long d0, long n) const {
    const long row = W * generator_.R;
    if (!kDirect) store_row(dweight() + d0 * row, n * row, static_cast<T*>(p_.dweight) + d0 * row);
    for (int64_t sequence = 0; sequence < in_.N; ++sequence)
      store_row(dstate(sequence, d0), n * K, static_cast<T*>(p_.dconv_state) + (sequence * in_.D + d0) * K);
    for (int w = 0; w < W; ++w)
      store_some(static_cast<T*>(p_.dbias) + d0 * W + w, W, n, Simd<Acc>::load(dbias_.get() + (panel * W + w) * L));
  }

  void prefetch_rows(long token, long end, long d0) const {
    for (long i = 0; i < M && token + i < end; ++i) {
      const Row& row = rows_.get()[token + i];
      __builtin_prefetch(token_at<T>(in_.x, in_, row, token + i) + d0 * in_.x.strides.d);
      __builtin_prefetch(token_at<T>(p_.grad_y, in_, row, token + i) + d0 * p_.grad_y.strides.d);
    }
  }

  // taps [M, W] vectors = bias + hidden weight^T
  void generate(const Unit* tile, const Unit* packed, const Acc* bias, Acc* taps) const {
    Tile<Acc, M, W> acc;
    acc.load(bias, 0);
    acc.add_product(tile, 1, M, packed, W * L, steps_);
    acc.store(taps, W * L);
  }

  void differentiate_row(long token, long d0, long n, const Acc* taps, Vec (&dbias)[W], Number* dtaps, Acc* dx) const {
    const Row& row = rows_.get()[token];
    Vec input[W], z{};
    for (int w = W - 1; w >= 0; --w) {
      input[w] = tap_input<T, W>(in_, row, token, w, d0, n);
      z += Simd<Acc>::load(taps + w * L) * input[w];
    }
    const int64_t stride = p_.grad_y.strides.d;
    const Vec dy = load_some(token_at<T>(p_.grad_y, in_, row, token) + d0 * stride, stride, n);
    const Vec dz = in_.silu ? dy * silu_slope(z) : dy;
    for (int w = 0; w < W; ++w) {
      const Vec dk = dz * input[w];  // dtaps = dz input
      dbias[w] += dk;
      store(dtaps + w * L, dk);
      const Vec dinput = dz * Simd<Acc>::load(taps + w * L);
      const int64_t p = row.position - K + w;
      if (p >= 0)
        Simd<Acc>::store(dx + w * L, Simd<Acc>::load(dx + w * L) + dinput);
      else
        add_state_gradient(dstate(row.sequence, d0) + p + K, K, n, dinput);
    }
  }

  void write_dx(long token, long d0, long n, const Acc* sum) const {
    const Vec tail = tail_gradient<T, W>(in_, static_cast<const T*>(p_.grad_conv_state_out), rows_.get()[token], d0, n);
    store_some(static_cast<T*>(p_.dx) + token * in_.D + d0, 1, n, Simd<Acc>::load(sum) + tail);
  }

  // The panel's dtaps [t][w, channel] as units along t.
  const Unit* dtaps_by_token(long slot, long panel, long steps) const {
    if constexpr (terms == 1) {
      return reinterpret_cast<const Unit*>(dtaps_row(panel, 0));
    } else {
      Unit* pairs = pair_scratch_.get() + slot * (block_ / terms) * W * L;
      for (long s = 0; s < steps; ++s)
        for (int w = 0; w < W; ++w) {
          const Number* const rows[terms] = {dtaps_row(panel, 2 * s) + w * L, dtaps_row(panel, 2 * s + 1) + w * L};
          Simd<Unit>::store(pairs + (s * W + w) * L, P::combine(rows, 1, L));
        }
      return pairs;
    }
  }

  // dweight [L*W, R] += dtaps^T hidden over the block's tokens
  void add_dweight(long slot, long panel, long d0, long n, long begin, long end) const {
    const long steps = units_for(end - begin, terms);
    const Unit* a = dtaps_by_token(slot, panel, steps);
    alignas(64) Acc edge[MW * VW * L];
    for (long j = 0; j < weight_columns_; ++j) {
      const Unit* b = columns_.get() + j * (block_ / terms) * VW * L;
      const long r = j * VW * L, columns = smaller(VW * L, generator_.R - r);
      for (int m = 0; m < W * L; m += MW) {
        const long c = m % L, w = m / L, row_stride = W * generator_.R, channels = smaller(MW, n - c);
        if (channels <= 0) continue;
        Acc* out = dweight() + ((d0 + c) * W + w) * generator_.R + r;
        const bool whole = channels == MW && columns == VW * L;
        Tile<Acc, MW, VW> acc;
        if (begin == 0) {
          acc.zero();
        } else if (whole) {
          acc.load(out, row_stride);
        } else {
          for (long i = 0; i < channels; ++i)
            for (long k = 0; k < columns; ++k) edge[i * VW * L + k] = out[i * row_stride + k];
          acc.load(edge, VW * L);
        }
        acc.add_product(a + m, 1, W * L, b, VW * L, steps);
        if (whole) {
          acc.store(out, row_stride);
        } else {
          acc.store(edge, VW * L);
          for (long i = 0; i < channels; ++i)
            for (long k = 0; k < columns; ++k) out[i * row_stride + k] = edge[i * VW * L + k];
        }
      }
    }
  }

  // Rows [w, channel] of weight as units along that order, columns of one dhidden tile.
  void pack_weight_columns(long j, long panel, Unit* out) const {
    const T* weight = static_cast<const T*>(generator_.weight);
    for (int m = 0; m < W * L; m += terms)
      for (int v = 0; v < VH; ++v, out += L) {
        const long r = (j * VH + v) * L;
        const T* rows[terms];
        for (int i = 0; i < terms; ++i) {
          const long d = panel * L + (m + i) % L;
          rows[i] = d < in_.D && r < generator_.R ? weight + (d * W + m / L) * generator_.R + r : nullptr;
        }
        Simd<Unit>::store(out, P::combine(rows, 1, generator_.R - r));
      }
  }

  // dhidden [first, last) of the block, column tile j: dtaps weight
  void run_columns(long j, long begin, long first, long last) const {
    constexpr long steps = W * L / terms;
    const long row_stride = hidden_columns_ * VH * L;
    for (long panel0 = 0; panel0 < panels_; panel0 += kPanelsAtOnce) {
      const long panel1 = smaller(panels_, panel0 + kPanelsAtOnce);
      for (long i = first; i < last; i += MH) {
        Acc* out = dhidden_.get() + i * row_stride + j * VH * L;
        Tile<Acc, MH, VH> acc;
        if (panel0 == 0)
          acc.zero();
        else
          acc.load(out, row_stride);
        for (long panel = panel0; panel < panel1; ++panel) {
          const Number* a = dtaps_row(panel, i);
          for (long ahead = 0; ahead < MH * W * L; ahead += 64 / long(sizeof(Number)))
            __builtin_prefetch(a + MH * W * L + ahead);  // the next rows of this panel
          acc.add_product(reinterpret_cast<const Unit*>(a), steps, 1,
                          weight_.get() + (j * panels_ + panel) * steps * VH * L, VH * L, steps);
        }
        acc.store(out, row_stride);
      }
    }
    for (long i = first; i < last; ++i)
      for (int v = 0; v < VH; ++v) {
        const long r = (j * VH + v) * L;
        if (r < generator_.R)
          store_some(static_cast<T*>(p_.dhidden) + (begin + i) * generator_.R + r, 1, generator_.R - r,
                     Simd<Acc>::load(dhidden_.get() + i * row_stride + r));
      }
  }

  const DynamicConvBackwardParams& p_;
  const ConvInputs& in_;
  const TapGenerator& generator_;
  const Parallel& parallel_;
  long slots_, tokens_, block_, steps_, panels_, weight_columns_, hidden_columns_;
  Buffer<Row> rows_;
  Buffer<Unit> tiles_, columns_;
  Buffer<Number> dtaps_;  // [panel][t][w, channel]
  Buffer<Acc> dhidden_, dweight_, dbias_, halo_, dstate_;
  Buffer<Unit> panel_scratch_;
  Buffer<Acc> dx_scratch_;
  Buffer<Unit> pair_scratch_, weight_;
};

// Bf16Product needs dtaps rounded to bf16, as any bf16 GEMM of the gradients does. Over many elements these errors
// stay relative to the RMS of the result; a handful of terms can cancel to less than their rounding.
bool bf16_dtaps_is_exact_enough(const DynamicConvBackwardParams& p) {
  return p.in.B * p.in.T * p.in.D * p.generator.R >= 1 << 20;
}

}  // namespace

void dynamic_conv_backward_cpu(const DynamicConvBackwardParams& p, const Parallel& parallel) {
  with_product(p.in, bf16_dtaps_is_exact_enough(p), [&](auto types, auto taps) {
    using Types = decltype(types);
    const Parallel workers = for_work(parallel, 3 * conv_work(p.in, p.generator));
    Backward<typename Types::Product, typename Types::Element, taps>(p, workers).run();
  });
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(dynamic_conv_backward_cpu, DynamicConvBackwardParams, params.in.x.dtype)
