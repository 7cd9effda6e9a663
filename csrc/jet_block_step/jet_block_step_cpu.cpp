// A JetBlock's step on a CPU, bound by reading the generator's weight once, and by reading and writing the states once.
// First the convolution, whose panels of channels are for all sequences; then the delta rule, head by head, each
// followed by its norm while its output is in the cache.
#include "csrc/jet_block_step/jet_block_step.h"

#include "csrc/cpu/isa.h"
#include "csrc/dynamic_conv/rows_cpu.h"
#include "csrc/gated_delta_rule/recurrent_item_cpu.h"

namespace jet::cpu::JET_CPU_ISA {

void dynamic_conv_step_of_silu_cpu(const DynamicConvStepParams& params, const Parallel& parallel);

namespace {

// Numbers in the arithmetic type, zero-padded to whole vectors.
template <class T>
void load_numbers(const NumberVector& from, long n, T* to) {
  const auto load = [&](auto element) {
    using Element = decltype(element);
    if constexpr (sizeof(Arithmetic<Element>) == sizeof(T))
      load_row(static_cast<const Element*>(from.data), 1, n, round_up(n, Simd<T>::lanes), to);
  };
  switch (from.dtype) {
    case Dtype::f32: return load(float());
    case Dtype::f64: return load(double());
    case Dtype::bf16: return load(bf16());
    case Dtype::f16: return load(f16());
  }
}

template <class T>
JET_INLINE void silu_row(T* x, long padded) {
  for (long j = 0; j < padded; j += Simd<T>::lanes) Simd<T>::store(x + j, silu(Simd<T>::load(x + j)));
}

template <class In, class T, class St>
class HeadSteps {
  using S = Simd<T>;
  using Vec = Vector<T>;

  struct Item {
    RecurrentItem<T> recurrent;
    T* o;  // [columns]
  };
  struct CarveItem {
    long K;
    Item operator()(Carver& from, long columns) const {
      Item item;
      item.recurrent.carve(from, K, columns);
      item.o = from.take<T>(round_up(columns, S::stripe));
      return item;
    }
  };

 public:
  HeadSteps(const JetBlockStepParams& p, const In* v, const Parallel& parallel)
      : p_(p),
        in_(p.recurrent.in),
        v_(v),
        slices_(parallel, in_.B, in_.H, in_.V, CarveItem{in_.K}),
        shared_(in_.B * in_.H < parallel.threads),
        padded_V_(round_up(in_.V, S::stripe)),
        A_log_(round_up(in_.H, S::lanes)),
        dt_bias_(round_up(in_.H, S::lanes)),
        norm_weight_(round_up(in_.V, S::lanes)),
        o_(shared_ ? in_.B * in_.H * padded_V_ : 0),
        columns_done_(shared_ ? in_.B * in_.H : 0) {
    load_numbers(p.gates.A_log, in_.H, A_log_.get());
    load_numbers(p.gates.dt_bias, in_.H, dt_bias_.get());
    load_numbers(p.norm_weight, in_.V, norm_weight_.get());
    for (long head = 0; shared_ && head < in_.B * in_.H; ++head) columns_done_.get()[head] = 0;
  }

  void run() const {
    slices_([&](const Slice& slice, Item& item) { step(slice, item); });
  }

 private:
  // Columns of a head: the delta rule, and the norm by whoever has the head's last columns.
  void step(const Slice& slice, Item& item) const {
    if (slice.v1 <= slice.v0) return;  // behind the last of several slices
    const long head = slice.n * in_.H + slice.h, row = row_of(p_.recurrent.pool, slice.n);
    T* const o = shared_ ? o_.get() + head * padded_V_ : item.o;
    if (row >= 0) advance(slice, row, item.recurrent, o + (shared_ ? slice.v0 : 0));
    if (shared_) {
      const long columns = slice.v1 - slice.v0;
      if (__atomic_add_fetch(columns_done_.get() + head, columns, __ATOMIC_ACQ_REL) < in_.V) return;
    }
    In* const y = static_cast<In*>(p_.y) + head * in_.V;
    if (row < 0)
      __builtin_memset(y, 0, in_.V * sizeof(In));
    else
      normalise_and_gate(o, at<In>(p_.gate, slice.n, 0, slice.h), p_.gate.strides.d, y);
  }

  void advance(const Slice& slice, long row, RecurrentItem<T>& item, T* o) const {
    const StatePool& pool = p_.recurrent.pool;
    load_token(slice.n, slice.h, item);
    St* const state = at(static_cast<St*>(pool.data), pool.strides, row, slice.h);
    const In* const v = v_ + (slice.n * in_.H + slice.h) * in_.V;
    for (long c = slice.v0; c < slice.v1; c += S::stripe) {
      const long columns = smaller(S::stripe, slice.v1 - c);
      const auto load_v = [&](long) { load_row(v + c, 1, columns, S::stripe, item.vo); };
      const auto store_o = [&](long) { store_row(item.vo, columns, o + (c - slice.v0)); };
      const Rows<T> stripe{item.stripes + (c - slice.v0) * in_.K, S::stripe};
      recurrent_stripe(item, false, 1, true, true, in_.K, T(in_.scale), pool, state, c, columns, stripe, Call(load_v),
                       Call(store_o));
    }
  }

  void load_token(long n, long h, RecurrentItem<T>& item) const {
    load_row(at<In>(in_.q, n, 0, h), in_.q.strides.d, in_.K, item.ld, item.q);
    load_row(at<In>(in_.k, n, 0, h), in_.k.strides.d, in_.K, item.ld, item.k);
    silu_row(item.q, item.ld), silu_row(item.k, item.ld);
    normalise(item.q, item.ld), normalise(item.k, item.ld);
    Vec qk{};
    for (long j = 0; j < item.ld; j += S::lanes) qk += S::load(item.q + j) * S::load(item.k + j);
    const double x = one(at<In>(in_.g, n, 0, h)) + dt_bias_.get()[h];
    const double softplus = (x > 0 ? x : 0) + __builtin_log1p(__builtin_exp(-__builtin_fabs(x)));
    const double decay = __builtin_exp(-__builtin_exp(A_log_.get()[h]) * softplus);
    const double beta = 1 / (1 + __builtin_exp(-double(one(at<In>(in_.beta, n, 0, h)))));
    item.tokens[0] = {item.q, item.k, horizontal_sum<T>(qk), T(decay), T(beta)};
  }

  static T one(const In* x) { return load_some(x, 1, 1)[0]; }

  void normalise_and_gate(const T* o, const In* gate, long stride, In* y) const {
    constexpr long L = S::lanes;
    Vec squares{};
    for (long c = 0; c < in_.V; c += L) {
      const Vec x = load_some(o + c, 1, in_.V - c);
      squares += x * x;
    }
    const T factor = T(1) / T(__builtin_sqrt(horizontal_sum<T>(squares) / T(in_.V) + T(p_.eps)));
    for (long c = 0; c < in_.V; c += L) {
      const Vec x = load_some(o + c, 1, in_.V - c) * factor * S::load(norm_weight_.get() + c);
      store_some(y + c, 1, in_.V - c, x * silu(load_some(gate + c * stride, stride, in_.V - c)));
    }
  }

  const JetBlockStepParams& p_;
  const GatedDeltaRuleInputs& in_;
  const In* v_;  // [N, H, V] after the convolution
  const Slices<T, CarveItem> slices_;
  const bool shared_;  // whether several workers have one head
  const long padded_V_;
  Buffer<T> A_log_, dt_bias_, norm_weight_;
  Buffer<T> o_;                // [N, H, padded V], where heads are shared
  Buffer<long> columns_done_;  // [N, H], where heads are shared
};

template <class In, class T, class St>
void jet_block_step(const JetBlockStepParams& p, const Parallel& caller) {
  const GatedDeltaRuleInputs& in = p.recurrent.in;
  if (in.B == 0) return;
  Buffer<In> v(in.B * p.conv.in.D);
  const HeadSteps<In, T, St> heads(p, v.get(), for_work(caller, 3. * in.B * in.H * in.K * in.V));
  DynamicConvStepParams conv = p.conv;
  conv.y = v.get();
  JET_CPU_ISA::dynamic_conv_step_of_silu_cpu(conv, caller);
  heads.run();
}

}  // namespace

void jet_block_step_cpu(const JetBlockStepParams& p, const Parallel& parallel) {
  const auto with_inputs = [&](auto in) {
    with_fp32_pool(p.recurrent.pool.dtype, [&](auto state) {
      jet_block_step<decltype(in), float, typename decltype(state)::Type>(p, parallel);
    });
  };
  switch (p.recurrent.in.q.dtype) {
    case Dtype::f32: return with_inputs(float());
    case Dtype::f64: JET_CPU_FP64(jet_block_step<double, double, double>(p, parallel));
    case Dtype::bf16: return with_inputs(bf16());
    case Dtype::f16: return with_inputs(f16());
  }
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(jet_block_step_cpu, JetBlockStepParams, params.recurrent.in.q.dtype)
