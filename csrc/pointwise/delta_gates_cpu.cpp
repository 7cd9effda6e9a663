// A row of heads is shorter than a vector (12 heads, 16 lanes), so several rows are put side by side in a buffer, and
// exp(A_log) and dt_bias are repeated along it.
#include "csrc/pointwise/delta_gates.h"

#include <algorithm>

#include "csrc/cpu/activations.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/tasks.h"
#include "csrc/cpu/tensor_access.h"

namespace jet::cpu::JET_CPU_ISA {
namespace {

constexpr long kBlock = 1024;        // elements of a buffer: 4 KB in fp32
constexpr long kSummed = 512;        // tokens whose terms of dA_log and ddt_bias are summed by one task
constexpr double kElementWork = 25;  // an element takes the time of about so many multiply-adds

// T: of a and b. Columns [first, first + width) of a block of tokens; width is H but for very many heads.
template <class T>
class Gates {
  using Real = Arithmetic<T>;
  using Vec = Vector<Real>;
  static constexpr long L = kLanes<T>;
  typedef Real Row[kBlock + L];  // the last vector of a block may reach beyond it

 public:
  static long width(const DeltaGatesInputs& in) { return larger(1, smaller(in.H, kBlock)); }
  static long tokens_at_once(const DeltaGatesInputs& in) { return larger(1, smaller(in.tokens, kBlock / width(in))); }

  Gates(const DeltaGatesInputs& in, long first, long tokens) : in_(in), first_(first) {
    width_ = smaller(width(in), in.H - first);
    load_row(static_cast<const Real*>(in.A_log) + first, 1, width_, round_up(width_, L), rate_);
    for (long i = 0; i < width_; i += L) store(rate_ + i, exponential(load(rate_ + i)));
    load_row(static_cast<const Real*>(in.dt_bias) + first, 1, width_, round_up(width_, L), bias_);
    for (long t = 1; t < tokens; ++t)
      for (long h = 0; h < width_; ++h) rate_[t * width_ + h] = rate_[h], bias_[t * width_ + h] = bias_[h];
  }

  void forward(const DeltaGatesParams& p, long token, long tokens) {
    const long n = tokens * width_;
    gather<T>(in_.a, token, tokens, a_);
    gather<T>(in_.b, token, tokens, b_);
    Real* g = static_cast<Real*>(p.g) + token * in_.H + first_;
    Real* beta = static_cast<Real*>(p.beta) + token * in_.H + first_;
    for (long i = 0; i < n; i += L) {
      const long m = smaller(L, n - i);
      store_some(g + i, 1, m, -load(rate_ + i) * softplus(load(a_ + i) + load(bias_ + i)));
      store_some(beta + i, 1, m, sigmoid(load(b_ + i)));
    }
  }

  // Adds the block's terms to dA_log and ddt_bias [H].
  void backward(const DeltaGatesBackwardParams& p, long token, long tokens, double* dA_log, double* ddt_bias) {
    const long n = tokens * width_;
    gather<T>(in_.a, token, tokens, a_);
    gather<Real>(p.grad_g, token, tokens, grad_);
    T* da = static_cast<T*>(p.da) + token * in_.H + first_;
    T* db = static_cast<T*>(p.db) + token * in_.H + first_;
    for (long i = 0; i < n; i += L) {
      const Vec x = load(a_ + i) + load(bias_ + i), scaled = -load(grad_ + i) * load(rate_ + i);
      store(a_ + i, scaled * sigmoid(x));      // dx
      store(grad_ + i, scaled * softplus(x));  // dg g
    }
    store_row(a_, n, da);
    for (long t = 0; t < tokens; ++t)
      for (long h = 0; h < width_; ++h) {
        dA_log[first_ + h] += grad_[t * width_ + h];
        ddt_bias[first_ + h] += a_[t * width_ + h];
      }
    if (p.grad_beta.data == nullptr) return store_row(zeros(n), n, db);
    gather<T>(in_.b, token, tokens, b_);
    gather<Real>(p.grad_beta, token, tokens, grad_);
    for (long i = 0; i < n; i += L) {
      const Vec b = load(b_ + i);
      store(b_ + i, load(grad_ + i) * sigmoid(b) * sigmoid(-b));  // 1 - sigmoid(b) would cancel
    }
    store_row(b_, n, db);
  }

 private:
  // The block's elements of x, row after row.
  template <class From>
  void gather(const StridedRows& x, long token, long tokens, Real* to) const {
    const From* from = at<From>(x, token, first_);
    if (x.column == 1 && x.row == width_) return load_row(from, 1, tokens * width_, round_up(tokens * width_, L), to);
    // What a row writes behind its end, the next one overwrites.
    for (long t = 0; t < tokens; ++t)
      load_row(from + t * x.row, x.column, width_, round_up(width_, L), to + t * width_);
  }

  const Real* zeros(long n) {
    std::fill(b_, b_ + n, Real(0));
    return b_;
  }

  const DeltaGatesInputs& in_;
  long first_, width_;
  alignas(64) Row rate_;
  alignas(64) Row bias_;
  alignas(64) Row a_;
  alignas(64) Row b_;
  alignas(64) Row grad_;
};

template <class T>
void forward(const DeltaGatesParams& p, const Parallel& parallel) {
  const DeltaGatesInputs& in = p.in;
  const long width = Gates<T>::width(in), at_once = Gates<T>::tokens_at_once(in);
  const long blocks = (in.tokens + at_once - 1) / at_once, pieces = (in.H + width - 1) / width;
  for_work(parallel, kElementWork * in.tokens * in.H)(0, pieces * blocks, 4, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const long piece = begin / blocks, stop = smaller(end, (piece + 1) * blocks);
      Gates<T> gates(in, piece * width, at_once);
      for (; begin < stop; ++begin) {
        const long token = begin % blocks * at_once;
        gates.forward(p, token, smaller(at_once, in.tokens - token));
      }
    }
  });
}

template <class T>
void backward(const DeltaGatesBackwardParams& p, const Parallel& parallel) {
  using Real = Arithmetic<T>;
  const DeltaGatesInputs& in = p.in;
  const long width = Gates<T>::width(in), at_once = Gates<T>::tokens_at_once(in);
  // How the sums are cut does not depend on who computes them.
  const long chunks = (in.tokens + kSummed - 1) / kSummed, pieces = (in.H + width - 1) / width;
  Buffer<double> sums(chunks * 2 * in.H);
  std::fill(sums.get(), sums.get() + chunks * 2 * in.H, 0.);
  for_work(parallel, 2 * kElementWork * in.tokens * in.H)(0, pieces * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const long chunk = task % chunks;
      double* own = sums.get() + chunk * 2 * in.H;
      Gates<T> gates(in, task / chunks * width, at_once);
      const long stop = smaller(in.tokens, (chunk + 1) * kSummed);
      for (long token = chunk * kSummed; token < stop; token += at_once)
        gates.backward(p, token, smaller(at_once, stop - token), own, own + in.H);
    }
  });
  for (long h = 0; h < in.H; ++h) {
    double dA_log = 0, ddt_bias = 0;
    for (long chunk = 0; chunk < chunks; ++chunk) {
      dA_log += sums.get()[chunk * 2 * in.H + h];
      ddt_bias += sums.get()[(chunk * 2 + 1) * in.H + h];
    }
    static_cast<Real*>(p.dA_log)[h] = Real(dA_log), static_cast<Real*>(p.ddt_bias)[h] = Real(ddt_bias);
  }
}

}  // namespace

void delta_gates_cpu(const DeltaGatesParams& p, const Parallel& parallel) {
  switch (p.in.dtype) {
    case Dtype::f32: return forward<float>(p, parallel);
    case Dtype::f64: JET_CPU_FP64(forward<double>(p, parallel));
    case Dtype::f16: return forward<f16>(p, parallel);
    case Dtype::bf16: return forward<bf16>(p, parallel);
  }
}

void delta_gates_backward_cpu(const DeltaGatesBackwardParams& p, const Parallel& parallel) {
  switch (p.in.dtype) {
    case Dtype::f32: return backward<float>(p, parallel);
    case Dtype::f64: JET_CPU_FP64(backward<double>(p, parallel));
    case Dtype::f16: return backward<f16>(p, parallel);
    case Dtype::bf16: return backward<bf16>(p, parallel);
  }
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(delta_gates_cpu, DeltaGatesParams, params.in.dtype)
JET_CPU_LAUNCHER(delta_gates_backward_cpu, DeltaGatesBackwardParams, params.in.dtype)
