// A row at a time: it is read from memory once, and a second time from the cache.
#include "csrc/norm/rms_norm.h"

#include "csrc/cpu/isa.h"
#include "csrc/cpu/tasks.h"
#include "csrc/norm/row_cpu.h"

namespace jet::cpu::JET_CPU_ISA {
namespace {

// Multiply-adds that take the time of an element (0.24 ns; with a gate 0.8 ns on a Xeon with AVX-512).
constexpr double kForward = 2.5, kBackward = 6, kGate = 6;

double work(const NormInputs& in, double of_element) {
  return double(in.rows) * in.C * (of_element + (in.gate.data != nullptr ? kGate : 0));
}

// Rows from `row` on, in order.
template <class T>
class RowPointer {
 public:
  RowPointer(const NormInputs& in, const NormRows& rows, int64_t row)
      : rows_(rows), inner_(in.inner), outer_(row / in.inner), at_(row % in.inner) {}
  const T* get() const {
    return static_cast<const T*>(rows_.data) + outer_ * rows_.outer_stride + at_ * rows_.inner_stride;
  }
  void next() {
    if (++at_ == inner_) at_ = 0, ++outer_;
  }

 private:
  const NormRows& rows_;
  int64_t inner_, outer_, at_;
};

template <class T, class W>
void forward(const RmsNormParams& p, const Parallel& parallel) {
  const NormInputs& in = p.in;
  const W* weight = static_cast<const W*>(in.weight);
  parallel(0, in.rows, larger(1, 16384 / larger(1, in.C)), [&](int64_t begin, int64_t end) {
    RowPointer<T> x(in, in.x, begin), residual(in, in.residual, begin), gate(in, in.gate, begin);
    for (int64_t row = begin; row < end; ++row, x.next(), residual.next(), gate.next()) {
      T* y = static_cast<T*>(p.y) + row * in.C;
      if (in.gate.data != nullptr) {
        gated_norm_row(x.get(), gate.get(), weight, in.C, in.eps, y);
      } else if (in.residual.data != nullptr) {
        T* sum = static_cast<T*>(p.sum) + row * in.C;
        add_row(x.get(), residual.get(), in.C, sum);
        norm_row(sum, weight, in.C, in.eps, y);
      } else {
        norm_row(x.get(), weight, in.C, in.eps, y);
      }
    }
  });
}

template <class T, class W>
class Backward {
  using Acc = Arithmetic<T>;
  using Vec = Vector<Acc>;
  static constexpr int L = kLanes<T>;

 public:
  explicit Backward(const RmsNormBackwardParams& p) : p_(p), in_(p.in), width_(round_up(in_.C, L)) {}

  // dweight is summed over pieces of the rows, and then over the pieces: as many as 64 threads need, and none so long
  // that the error of its sum would matter. They do not depend on how many threads there are.
  void run(const Parallel& parallel) const {
    const long piece = smaller(1024, larger(8, (in_.rows + 63) / 64)), pieces = (in_.rows + piece - 1) / piece;
    Buffer<Acc> sums(pieces * width_);  // [pieces, width]
    parallel(0, pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        rows(i * piece, smaller(in_.rows, (i + 1) * piece), sums.get() + i * width_);
    });
    const auto sum_up = [&](int64_t begin, int64_t end) {
      for (long c = begin * L; c < end * L; c += L) {
        Vec sum{};
        for (long i = 0; i < pieces; ++i) sum += load(sums.get() + i * width_ + c);
        store_some(static_cast<W*>(p_.dweight) + c, 1, smaller(L, in_.C - c), sum);
      }
    };
    for_work(parallel, double(pieces) * width_)(0, width_ / L, 4, sum_up);
  }

 private:
  void rows(int64_t begin, int64_t end, Acc* dweight) const {
    for (long c = 0; c < width_; c += L) store(dweight + c, Vec{});
    RowPointer<T> x(in_, in_.x, begin), residual(in_, in_.residual, begin), gate(in_, in_.gate, begin);
    for (int64_t r = begin; r < end; ++r, x.next(), residual.next(), gate.next()) {
      if (in_.gate.data != nullptr) {
        row<true>(r, x.get(), gate.get(), dweight);
      } else if (in_.residual.data != nullptr) {
        T* sum = static_cast<T*>(p_.dx) + r * in_.C;  // until dx takes its place
        add_row(x.get(), residual.get(), in_.C, sum);
        row<false>(r, sum, nullptr, dweight);
      } else {
        row<false>(r, x.get(), nullptr, dweight);
      }
    }
  }

  template <bool gated>
  void row(int64_t r, const T* z, const T* gate, Acc* dweight) const {
    const T* dy = static_cast<const T*>(p_.grad_y) + r * in_.C;
    const W* weight = static_cast<const W*>(in_.weight);
    Vec zz{}, uz{};
    for_vectors<L>(in_.C, [&](long c, long n) JET_INLINE_LAMBDA {
      const Vec x = load_some(z + c, 1, n);
      Vec u = load_some(dy + c, 1, n) * load_some(weight + c, 1, n);
      if constexpr (gated) u *= silu(load_some(gate + c, 1, n));
      zz += x * x, uz += u * x;
    });
    const Acc inverse = inverse_rms(sum_by_halves<Acc>(zz), in_.C, in_.eps);
    const Acc projection = inverse * sum_by_halves<Acc>(uz) / Acc(in_.C);  // mean(u y), where y = r z
    for_vectors<L>(in_.C, [&](long c, long n) JET_INLINE_LAMBDA {
      const Vec x = load_some(z + c, 1, n), g = load_some(dy + c, 1, n), w = load_some(weight + c, 1, n);
      const Vec normed = x * inverse;
      Vec activated = Vec{} + 1;
      if constexpr (gated) {
        const Vec h = load_some(gate + c, 1, n), s = sigmoid(h);
        activated = h * s;
        store_row_part(p_.dgate, r, c, n, g * normed * w * (s * (1 + h * (1 - s))));
      }
      store(dweight + c, load(dweight + c) + g * normed * activated);
      Vec dz = inverse * (g * w * activated - projection * normed);
      if (p_.grad_sum != nullptr) dz += load_some(static_cast<const T*>(p_.grad_sum) + r * in_.C + c, 1, n);
      store_row_part(p_.dx, r, c, n, dz);
      if (p_.dresidual != nullptr) store_row_part(p_.dresidual, r, c, n, dz);
    });
  }

  JET_INLINE void store_row_part(void* to, int64_t r, long c, long n, Vec x) const {
    store_some(static_cast<T*>(to) + r * in_.C + c, 1, n, x);
  }

  const RmsNormBackwardParams& p_;
  const NormInputs& in_;
  long width_;
};

// f(T(), W()) for the dtypes of a call.
template <class F>
void with_elements(const NormInputs& in, const F& f) {
  const bool wide = in.weight_dtype == Dtype::f32;
  switch (in.dtype) {
    case Dtype::f32: return f(float(), float());
    case Dtype::f64: JET_CPU_FP64(f(double(), double()));
    case Dtype::f16: return wide ? f(f16(), float()) : f(f16(), f16());
    case Dtype::bf16: return wide ? f(bf16(), float()) : f(bf16(), bf16());
  }
}

}  // namespace

void rms_norm_cpu(const RmsNormParams& p, const Parallel& parallel) {
  with_elements(p.in, [&](auto element, auto weight) {
    forward<decltype(element), decltype(weight)>(p, for_work(parallel, work(p.in, kForward)));
  });
}

void rms_norm_backward_cpu(const RmsNormBackwardParams& p, const Parallel& parallel) {
  with_elements(p.in, [&](auto element, auto weight) {
    Backward<decltype(element), decltype(weight)>(p).run(for_work(parallel, work(p.in, kBackward)));
  });
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(rms_norm_cpu, RmsNormParams, params.in.dtype)
JET_CPU_LAUNCHER(rms_norm_backward_cpu, RmsNormBackwardParams, params.in.dtype)
