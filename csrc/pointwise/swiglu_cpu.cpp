// Many rows are bound by memory, one row by the exponential and the quotient.
#include "csrc/pointwise/swiglu.h"

#include "csrc/cpu/activations.h"
#include "csrc/cpu/isa.h"
#include "csrc/cpu/tasks.h"
#include "csrc/cpu/tensor_access.h"

namespace jet::cpu::JET_CPU_ISA {
namespace {

constexpr long kColumns = 1024;      // of a task: short enough that two threads share one row of a wide MLP
constexpr double kElementWork = 10;  // an element takes the time of about so many multiply-adds

// f(row, first column, columns) over all of [rows, C].
template <class F>
void each_piece(const Parallel& parallel, int64_t rows, int64_t C, double element_work, const F& f) {
  const long pieces = (C + kColumns - 1) / kColumns;
  const Parallel run = for_work(parallel, element_work * double(rows) * double(C));
  run(0, rows * pieces, larger(1, 8192 / larger(1, smaller(C, kColumns))), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const long c = task % pieces * kColumns;
      f(task / pieces, c, smaller(kColumns, C - c));
    }
  });
}

template <class T>
void forward(const SwigluParams& p, const Parallel& parallel) {
  constexpr long L = kLanes<T>;
  each_piece(parallel, p.rows, p.C, kElementWork, [&](long r, long c, long n) {
    const T *gate = at<T>(p.gate, r, c), *up = at<T>(p.up, r, c);
    T* y = static_cast<T*>(p.y) + r * p.C + c;
    for (long i = 0; i < n; i += L) {
      const long m = smaller(L, n - i);
      const auto z = load_some(gate + i * p.gate.column, p.gate.column, m);
      store_some(y + i, 1, m, silu(z) * load_some(up + i * p.up.column, p.up.column, m));
    }
  });
}

template <class T>
void backward(const SwigluBackwardParams& p, const Parallel& parallel) {
  constexpr long L = kLanes<T>;
  each_piece(parallel, p.rows, p.C, 2 * kElementWork, [&](long r, long c, long n) {
    const T *grad_y = at<T>(p.grad_y, r, c), *gate = at<T>(p.gate, r, c), *up = at<T>(p.up, r, c);
    T* dgate = static_cast<T*>(p.dgate) + r * p.C + c;
    T* dup = static_cast<T*>(p.dup) + r * p.C + c;
    for (long i = 0; i < n; i += L) {
      const long m = smaller(L, n - i);
      const auto z = load_some(gate + i * p.gate.column, p.gate.column, m);
      const auto dy = load_some(grad_y + i * p.grad_y.column, p.grad_y.column, m);
      const auto s = sigmoid(z);
      store_some(dgate + i, 1, m, dy * load_some(up + i * p.up.column, p.up.column, m) * (s * (1 + z * (1 - s))));
      store_some(dup + i, 1, m, dy * (z * s));
    }
  });
}

}  // namespace

void swiglu_cpu(const SwigluParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case Dtype::f32: return forward<float>(p, parallel);
    case Dtype::f64: JET_CPU_FP64(forward<double>(p, parallel));
    case Dtype::f16: return forward<f16>(p, parallel);
    case Dtype::bf16: return forward<bf16>(p, parallel);
  }
}

void swiglu_backward_cpu(const SwigluBackwardParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case Dtype::f32: return backward<float>(p, parallel);
    case Dtype::f64: JET_CPU_FP64(backward<double>(p, parallel));
    case Dtype::f16: return backward<f16>(p, parallel);
    case Dtype::bf16: return backward<bf16>(p, parallel);
  }
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(swiglu_cpu, SwigluParams, params.dtype)
JET_CPU_LAUNCHER(swiglu_backward_cpu, SwigluBackwardParams, params.dtype)
