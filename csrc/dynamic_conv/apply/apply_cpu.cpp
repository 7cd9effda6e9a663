// The convolution with explicit taps: bound by reading them, so each is read once per pass, in memory order.
#include "csrc/dynamic_conv/apply/apply_dynamic_conv.h"

#include "csrc/cpu/isa.h"
#include "csrc/dynamic_conv/state_gradient_cpu.h"

namespace jet::cpu::JET_CPU_ISA {
namespace {

template <class T, int W>
class Apply {
  using Acc = Arithmetic<T>;
  using Vec = Vector<Acc>;
  static constexpr int L = kLanes<T>, K = W - 1;

 public:
  Apply(const ConvInputs& in, const void* taps)
      : in_(in), taps_(static_cast<const T*>(taps)), tokens_(in.B * in.T), rows_(tokens_) {
    fill_rows(in_, rows_.get());
  }

  void forward(const ApplyDynamicConvParams& p, const Parallel& parallel) const {
    T* y = static_cast<T*>(p.y);
    parallel(0, tokens_ + in_.N, larger(1, 16384 / in_.D), [&](int64_t begin, int64_t end) {  // tokens, then states
      for (int64_t n = larger(begin, tokens_); n < end; ++n)
        write_conv_state(in_, n - tokens_, static_cast<T*>(p.conv_state_out));
      end = smaller(end, tokens_);
      for (int64_t token = begin; token < end; ++token)
        for (long d0 = 0; d0 < in_.D; d0 += L) {
          const long n = smaller(L, in_.D - d0);
          Vec taps[W], input[W];
          const Vec z = convolve(token, d0, n, taps, input);
          store_some(y + token * in_.D + d0, 1, n, in_.silu ? silu(z) : z);
        }
    });
  }

  void backward(const ApplyDynamicConvBackwardParams& p, const Parallel& parallel) const {
    const long slots = larger(1, parallel.threads), width = round_up(in_.D, L);
    const long chunk = larger(64, (tokens_ + 4 * slots - 1) / (4 * slots)), chunks = (tokens_ + chunk - 1) / chunk;
    Buffer<Acc> scratch(slots * W * width);
    run_tasks(parallel, slots, chunks + in_.N, [&](long slot, long task) {
      Acc* own = scratch.get() + slot * W * width;
      if (task < chunks)
        backward_chunk(p, task * chunk, smaller(tokens_, task * chunk + chunk), own, width);
      else
        backward_state(p, task - chunks, own);
    });
  }

 private:
  // taps[w] of n channels.
  JET_INLINE void load_taps(int64_t token, long d0, long n, Vec (&taps)[W]) const {
    const T* from = taps_ + (token * in_.D + d0) * W;
    T transposed[W][L] = {};
    if (n == L)
      for (int c = 0; c < L; ++c)
        for (int w = 0; w < W; ++w) transposed[w][c] = from[c * W + w];
    else
      for (long c = 0; c < n; ++c)
        for (int w = 0; w < W; ++w) transposed[w][c] = from[c * W + w];
    for (int w = 0; w < W; ++w) taps[w] = load(transposed[w]);
  }

  // z of n channels, and the taps and inputs it is made of.
  JET_INLINE Vec convolve(int64_t token, long d0, long n, Vec (&taps)[W], Vec (&input)[W]) const {
    load_taps(token, d0, n, taps);
    Vec z{};
    for (int w = W - 1; w >= 0; --w) {
      input[w] = tap_input<T, W>(in_, rows_.get()[token], token, w, d0, n);
      z += taps[w] * input[w];
    }
    return z;
  }

  JET_INLINE Vec output_gradient(const ApplyDynamicConvBackwardParams& p, int64_t token, long d0, long n, Vec z) const {
    const int64_t stride = p.grad_y.strides.d;
    const Vec dy = load_some(token_at<T>(p.grad_y, in_, rows_.get()[token], token) + d0 * stride, stride, n);
    return in_.silu ? dy * silu_slope(z) : dy;
  }

  // dtaps and dx of tokens [begin, end). dx of a token is complete W-1 tokens later: until then it is summed in a ring
  // of W rows. The halo of W-1 tokens after the chunk is differentiated once more, for its terms of the chunk's dx.
  void backward_chunk(const ApplyDynamicConvBackwardParams& p, int64_t begin, int64_t end, Acc* ring,
                      long width) const {
    for (int64_t token = begin; token < end + K; ++token) {
      Acc* fresh = ring + token % W * width;
      for (long d = 0; d < width; ++d) fresh[d] = 0;
      if (token < tokens_)
        for (long d0 = 0; d0 < in_.D; d0 += L) differentiate(p, token, begin, end, d0, ring + d0, width);
      const int64_t done = token - K;
      if (done < begin) continue;
      for (long d0 = 0; d0 < in_.D; d0 += L) {
        const long n = smaller(L, in_.D - d0);
        const Vec tail =
            tail_gradient<T, W>(in_, static_cast<const T*>(p.grad_conv_state_out), rows_.get()[done], d0, n);
        store_some(static_cast<T*>(p.dx) + done * in_.D + d0, 1, n,
                   Simd<Acc>::load(ring + done % W * width + d0) + tail);
      }
    }
  }

  void differentiate(const ApplyDynamicConvBackwardParams& p, int64_t token, int64_t begin, int64_t end, long d0,
                     Acc* ring, long width) const {
    const long n = smaller(L, in_.D - d0);
    Vec taps[W], input[W];
    const Vec dz = output_gradient(p, token, d0, n, convolve(token, d0, n, taps, input));
    for (int w = 0; w < W; ++w) {
      const int64_t target = token - K + w;
      if (target < begin || target >= end || rows_.get()[token].position < K - w) continue;
      Acc* sum = ring + target % W * width;
      Simd<Acc>::store(sum, Simd<Acc>::load(sum) + dz * taps[w]);
    }
    if (token >= end) return;
    T dtaps[W][L];
    for (int w = 0; w < W; ++w) store(dtaps[w], dz * input[w]);
    T* to = static_cast<T*>(p.dtaps) + (token * in_.D + d0) * W;
    if (n == L)
      for (int c = 0; c < L; ++c)
        for (int w = 0; w < W; ++w) to[c * W + w] = dtaps[w][c];
    else
      for (long c = 0; c < n; ++c)
        for (int w = 0; w < W; ++w) to[c * W + w] = dtaps[w][c];
  }

  // dconv_state[n, :, i] += sum over the tokens p <= i of dz taps[i - p], summed up in dstate [D, W-1]
  void backward_state(const ApplyDynamicConvBackwardParams& p, int64_t n, Acc* dstate) const {
    const int64_t first = sequence_begin(in_, n), length = sequence_length(in_, n);
    start_state_gradient<T>(in_, static_cast<const T*>(p.grad_conv_state_out), n, 0, in_.D, dstate);
    for (int64_t position = 0; position < smaller(K, length); ++position)
      for (long d0 = 0; d0 < in_.D; d0 += L) {
        const long channels = smaller(L, in_.D - d0);
        Vec taps[W], input[W];
        const Vec z = convolve(first + position, d0, channels, taps, input);
        const Vec dz = output_gradient(p, first + position, d0, channels, z);
        for (int w = 0; position + w < K; ++w)
          add_state_gradient<Acc>(dstate + d0 * K + position + w, K, channels, dz * taps[w]);
      }
    store_row(dstate, in_.D * K, static_cast<T*>(p.dconv_state) + n * in_.D * K);
  }

  const ConvInputs& in_;
  const T* taps_;  // [tokens, D, W]
  long tokens_;
  Buffer<Row> rows_;
};

// Multiply-adds that take the time of a forward: each tap is loaded for one of its own, at the pace of memory, which is
// a quarter of the arithmetic's.
double work(const ConvInputs& in) { return 4. * (in.B * in.T + in.N) * in.D * in.W; }

// f(Apply<T, W>) for the dtype and the number of taps of a call.
template <class F>
void with_apply(const ConvInputs& in, const void* taps, const F& f) {
  with_taps(in.W, [&](auto W) {
    switch (in.x.dtype) {
      case Dtype::f32: return f(Apply<float, W>(in, taps));
      case Dtype::f64: JET_CPU_FP64(f(Apply<double, W>(in, taps)));
      case Dtype::f16: return f(Apply<f16, W>(in, taps));
      case Dtype::bf16: return f(Apply<bf16, W>(in, taps));
    }
  });
}

}  // namespace

void apply_dynamic_conv_cpu(const ApplyDynamicConvParams& p, const Parallel& parallel) {
  with_apply(p.in, p.taps, [&](const auto& apply) { apply.forward(p, for_work(parallel, work(p.in))); });
}

void apply_dynamic_conv_backward_cpu(const ApplyDynamicConvBackwardParams& p, const Parallel& parallel) {
  with_apply(p.in, p.taps, [&](const auto& apply) { apply.backward(p, for_work(parallel, 2 * work(p.in))); });
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(apply_dynamic_conv_cpu, ApplyDynamicConvParams, params.in.x.dtype)
JET_CPU_LAUNCHER(apply_dynamic_conv_backward_cpu, ApplyDynamicConvBackwardParams, params.in.x.dtype)
