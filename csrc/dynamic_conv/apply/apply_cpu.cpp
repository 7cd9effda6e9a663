// Explicit kernels: bound by reading them, so each is read once per pass, in memory order.
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
  explicit Apply(const ApplyDynamicConvParams& p) : p_(p), in_(p.in), tokens_(in_.B * in_.T), rows_(tokens_) {
    fill_rows(in_, rows_.get());
  }

  void forward(const Parallel& parallel) const {
    T* y = static_cast<T*>(p_.y);
    parallel(0, tokens_ + in_.N, larger(1, 16384 / in_.D), [&](int64_t begin, int64_t end) {  // tokens, then states
      for (int64_t n = larger(begin, tokens_); n < end; ++n)
        write_conv_state(in_, n - tokens_, static_cast<T*>(p_.conv_state_out));
      end = smaller(end, tokens_);
      for (int64_t token = begin; token < end; ++token)
        for (long d0 = 0; d0 < in_.D; d0 += L) {
          const long n = smaller(L, in_.D - d0);
          Vec kernel[W], input[W];
          const Vec z = convolve(token, d0, n, kernel, input);
          store_some(y + token * in_.D + d0, 1, n, p_.silu ? silu(z) : z);
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
  // The taps of n channels, tap by tap.
  JET_INLINE void load_kernel(int64_t token, long d0, long n, Vec (&kernel)[W]) const {
    const T* from = static_cast<const T*>(p_.kernels) + (token * in_.D + d0) * W;
    T taps[W][L] = {};
    if (n == L)
      for (int c = 0; c < L; ++c)
        for (int w = 0; w < W; ++w) taps[w][c] = from[c * W + w];
    else
      for (long c = 0; c < n; ++c)
        for (int w = 0; w < W; ++w) taps[w][c] = from[c * W + w];
    for (int w = 0; w < W; ++w) kernel[w] = load(taps[w]);
  }

  // z of n channels; also returns what it was made of.
  JET_INLINE Vec convolve(int64_t token, long d0, long n, Vec (&kernel)[W], Vec (&input)[W]) const {
    load_kernel(token, d0, n, kernel);
    Vec z{};
    for (int w = W - 1; w >= 0; --w) {
      input[w] = tap_input<T, W>(in_, rows_.get()[token], token, w, d0, n);
      z += kernel[w] * input[w];
    }
    return z;
  }

  JET_INLINE Vec output_gradient(const ApplyDynamicConvBackwardParams& p, int64_t token, long d0, long n, Vec z) const {
    const int64_t stride = p.grad_y_stride[2];
    const Vec dy =
        load_some(token_at<T>(p.grad_y, p.grad_y_stride, in_, rows_.get()[token], token) + d0 * stride, stride, n);
    return p_.silu ? dy * silu_slope(z) : dy;
  }

  // dkernels and dx of tokens [begin, end). dx of a token is complete W-1 tokens later: until then it is summed in a
  // ring of W rows. The W-1 tokens after the chunk are differentiated once more, for what they send back into it.
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
    Vec kernel[W], input[W];
    const Vec dz = output_gradient(p, token, d0, n, convolve(token, d0, n, kernel, input));
    for (int w = 0; w < W; ++w) {
      const int64_t target = token - K + w;
      if (target < begin || target >= end || rows_.get()[token].position < K - w) continue;
      Acc* sum = ring + target % W * width;
      Simd<Acc>::store(sum, Simd<Acc>::load(sum) + dz * kernel[w]);
    }
    if (token >= end) return;
    T taps[W][L];
    for (int w = 0; w < W; ++w) store(taps[w], dz * input[w]);
    T* to = static_cast<T*>(p.dkernels) + (token * in_.D + d0) * W;
    if (n == L)
      for (int c = 0; c < L; ++c)
        for (int w = 0; w < W; ++w) to[c * W + w] = taps[w][c];
    else
      for (long c = 0; c < n; ++c)
        for (int w = 0; w < W; ++w) to[c * W + w] = taps[w][c];
  }

  // dconv_state[n, :, i] += sum over the tokens p <= i of dz kernel[i - p], summed up in dstate [D, W-1]
  void backward_state(const ApplyDynamicConvBackwardParams& p, int64_t n, Acc* dstate) const {
    const int64_t first = sequence_begin(in_, n), length = sequence_length(in_, n);
    start_state_gradient<T>(in_, static_cast<const T*>(p.grad_conv_state_out), n, 0, in_.D, dstate);
    for (int64_t position = 0; position < smaller(K, length); ++position)
      for (long d0 = 0; d0 < in_.D; d0 += L) {
        const long channels = smaller(L, in_.D - d0);
        Vec kernel[W], input[W];
        const Vec z = convolve(first + position, d0, channels, kernel, input);
        const Vec dz = output_gradient(p, first + position, d0, channels, z);
        for (int w = 0; position + w < K; ++w)
          add_state_gradient<Acc>(dstate + d0 * K + position + w, K, channels, dz * kernel[w]);
      }
    store_row(dstate, in_.D * K, static_cast<T*>(p.dconv_state) + n * in_.D * K);
  }

  const ApplyDynamicConvParams& p_;
  const ConvInputs& in_;
  long tokens_;
  Buffer<Row> rows_;
};

// Each of an element and a tap is loaded and stored for one multiply-add: memory's pace, a quarter of the arithmetic's.
double work(const ConvInputs& in) { return 4. * (in.B * in.T + in.N) * in.D * in.W; }

// f(Apply<T, W>) for the dtype and taps of p.
template <class F>
void with_types(const ApplyDynamicConvParams& p, const F& f) {
  const auto with_taps = [&](auto element) {
    using T = decltype(element);
    switch (p.in.W) {
      case 2: return f(Apply<T, 2>(p));
      case 3: return f(Apply<T, 3>(p));
      case 4: return f(Apply<T, 4>(p));
    }
  };
  switch (p.in.dtype) {
    case Dtype::f32: return with_taps(float{});
    case Dtype::f64: JET_CPU_FP64(with_taps(double{}));
    case Dtype::f16: return with_taps(f16{});
    case Dtype::bf16: return with_taps(bf16{});
  }
}

}  // namespace

void apply_dynamic_conv_cpu(const ApplyDynamicConvParams& p, const Parallel& parallel) {
  with_types(p, [&](const auto& apply) { apply.forward(for_work(parallel, work(p.in))); });
}

void apply_dynamic_conv_backward_cpu(const ApplyDynamicConvBackwardParams& p, const Parallel& parallel) {
  with_types(p.forward, [&](const auto& apply) { apply.backward(p, for_work(parallel, 2 * work(p.forward.in))); });
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(apply_dynamic_conv_cpu, ApplyDynamicConvParams, params.in.dtype)
JET_CPU_LAUNCHER(apply_dynamic_conv_backward_cpu, ApplyDynamicConvBackwardParams, params.forward.in.dtype)
