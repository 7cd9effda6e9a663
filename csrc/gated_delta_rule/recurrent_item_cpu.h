// What the CPU kernels of the recurrent ops share: bound by reading and writing the states once. One work item is a
// sequence, a value head and a slice of V, processed in stripes one register tile wide. A token takes two passes over
// its stripe: the first, from memory, forms S^T k and S^T q together; the second, from L1, updates S, and is the first
// of the next token. The read-out of the updated state needs no third pass, as (e^g S + k u^T)^T q = e^g S^T q + (q.k)
// u.
#pragma once

#include <optional>

#include "csrc/gated_delta_rule/recurrent/recurrent_gated_delta_rule_verify.h"
#include "csrc/gated_delta_rule/rows_cpu.h"

namespace jet::cpu::JET_CPU_ISA {

// One token of one head, in the arithmetic type.
template <class T>
struct Token {
  const T *q, *k;     // [K] normalised
  T qk, decay, beta;  // <q, k>, e^g
};

// e^g of a token
template <class T>
JET_INLINE T decay_of(const TokenTensor& g, long n, long t, long h) {
  return T(__builtin_exp(*at<T>(g, n, t, h)));
}

// S^T k and S^T q of a token with the state before it, summed up row by row. NV vectors of columns.
template <int NV, class T>
struct Reading {
  Vector<T> predicted[NV], read[NV];

  JET_INLINE void clear() {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) predicted[j] = read[j] = Vector<T>{};
  }

  JET_INLINE void add_row(T k, T q, const Vector<T> (&s)[NV]) {
    const Vector<T> k_all = Simd<T>::all(k), q_all = Simd<T>::all(q);
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      predicted[j] += k_all * s[j];
      read[j] += q_all * s[j];
    }
  }

  // u, and o in the place of v
  JET_INLINE void finish(const Token<T>& token, T scale, T* vo, Vector<T> (&u)[NV]) const {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      u[j] = (load(vo + j * Simd<T>::lanes) - predicted[j] * token.decay) * token.beta;
      store(vo + j * Simd<T>::lanes, (read[j] * token.decay + u[j] * token.qk) * scale);
    }
  }
};

// A state [K, NV vectors] in memory, its rows `ld` apart.
template <class St>
struct Rows {
  St* data;
  long ld;

  template <int NV, class V>
  JET_INLINE void get(long i, V (&s)[NV]) const {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) s[j] = load(data + i * ld + j * kLanes<St>);
  }
  template <int NV, class V>
  JET_INLINE void put(long i, const V (&s)[NV]) const {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(data + i * ld + j * kLanes<St>, s[j]);
  }
};

// to <- S with S <- e^g S + k u^T for `count` tokens, one after the other, on S = from, which is read once. u(t, j):
// vector j of u_t. see(i, s) is shown each new row.
template <int NV, class T, class From, class To, class U, class See>
JET_INLINE void advance(const Token<T>* tokens, long count, long K, Rows<From> from, Rows<To> to, const U& u,
                        const See& see) {
  for (long i = 0; i < K; ++i) {
    Vector<T> s[NV];
    from.get(i, s);
    for (long t = 0; t < count; ++t) {
      const Vector<T> decay = Simd<T>::all(tokens[t].decay), k = Simd<T>::all(tokens[t].k[i]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) s[j] = decay * s[j] + k * u(t, j);
    }
    to.put(i, s);
    see(i, s);
  }
}

// Columns [v0, v1) of one sequence and value head.
struct Slice {
  long n, h, v0, v1;
};

// Slices that cover everything; carve(from, columns) makes an item: a worker's scratch memory for so many columns. It
// is allocated by the constructor.
template <class T, class Carve>
class Slices {
 public:
  Slices(const Parallel& parallel, long N, long H, long V, const Carve& carve)
      : parallel_(parallel), H_(H), V_(V), carve_(carve) {
    constexpr long W = Simd<T>::stripe;
    const long heads = N * H, stripes = round_up(V, W) / W;
    if (heads > 0 && heads < parallel.threads) of_head_ = smaller((parallel.threads + heads - 1) / heads, stripes);
    columns_ = round_up(stripes, of_head_) / of_head_ * W, items_ = heads * of_head_;
    workers_ = smaller(parallel.threads, items_);
    Carver count(nullptr);
    carve(count, columns_);
    scratch_.emplace(workers_, count.used());
  }

  // f(slice, item) for each
  template <class F>
  void operator()(const F& f) const {
    if (items_ == 0) return;
    run_even_tasks(parallel_, workers_, items_, [&](long worker, long i) {
      const long v0 = i % of_head_ * columns_;
      Carver from(scratch_->of(worker));
      auto item = carve_(from, columns_);
      f(Slice{i / of_head_ / H_, i / of_head_ % H_, v0, smaller(v0 + columns_, V_)}, item);
    });
  }

 private:
  const Parallel parallel_;
  const long H_, V_;
  const Carve carve_;
  long of_head_ = 1, columns_, items_, workers_;
  std::optional<Scratch> scratch_;
};

template <class T, class Carve, class F>
inline void for_slices(const Parallel& parallel, long N, long H, long V, const Carve& carve, const F& f) {
  Slices<T, Carve>(parallel, N, H, V, carve)(f);
}

// Whether columns of a pool can be worked on in place, in whole vectors.
template <class T>
JET_INLINE bool whole_vectors(const StatePool& pool, long columns) {
  return pool.strides.v == 1 && columns % Simd<T>::lanes == 0;
}

constexpr long kTokens = 16;  // tokens whose q and k are prepared at a time, shared by the stripes of a head

template <class T>
struct RecurrentItem {
  long ld;              // K rounded up to whole vectors
  T *q, *k;             // [kTokens, ld]
  T *stripes, *vo, *u;  // [V / W][K, W], [W], [W]
  Token<T> tokens[kTokens];

  void carve(Carver& from, long K, long V) {
    ld = round_up(K, Simd<T>::lanes);
    q = from.take<T>(kTokens * ld), k = from.take<T>(kTokens * ld);
    stripes = from.take<T>(V * K), vo = from.take<T>(Simd<T>::stripe), u = from.take<T>(Simd<T>::stripe);
  }
};

// item.tokens [count] for the tokens from t
template <class In, class T>
inline void load_tokens(const GatedDeltaRuleInputs& in, long n, long h, long t, long count, RecurrentItem<T>& item) {
  using S = Simd<T>;
  const long hk = h / (in.H / in.Hk);
  for (long i = 0; i < count; ++i) {
    T *q = item.q + i * item.ld, *k = item.k + i * item.ld;
    load_row(at<In>(in.q, n, t + i, hk), in.q.strides.d, in.K, item.ld, q);
    load_row(at<In>(in.k, n, t + i, hk), in.k.strides.d, in.K, item.ld, k);
    if (in.l2norm_qk) normalise(q, item.ld), normalise(k, item.ld);
    typename S::Vec qk{};
    for (long j = 0; j < item.ld; j += S::lanes) qk += S::load(q + j) * S::load(k + j);
    item.tokens[i] = {q, k, horizontal_sum<T>(qk), decay_of<T>(in.g, n, t + i, h), *at<T>(in.beta, n, t + i, h)};
  }
}

// Else it is recurrent_gated_delta_rule: one code for both takes half the time to compile, and looks at this once per
// token.
JET_INLINE bool is_verify(const RecurrentGatedDeltaRuleVerifyParams& vp) { return vp.updates != nullptr; }

// Where o and updates of token t are.
JET_INLINE long output_offset(const GatedDeltaRuleInputs& in, const Slice& slice, long t) {
  return ((slice.n * in.T + t) * in.H + slice.h) * in.V;
}

// What verify writes to keys for token t; null in all slices of a key head but one.
template <class T>
JET_INLINE T* keys_of(const RecurrentGatedDeltaRuleVerifyParams& vp, const Slice& slice, long t) {
  const GatedDeltaRuleInputs& in = vp.forward.in;
  const long group = in.H / in.Hk;
  if (slice.v0 != 0 || slice.h % group != 0) return nullptr;
  return static_cast<T*>(vp.keys) + ((slice.n * in.T + t) * in.Hk + slice.h / group) * in.K;
}

// A slice of a sequence without a row.
template <class In, class T>
inline void write_zeros(const RecurrentGatedDeltaRuleVerifyParams& vp, const Slice& slice) {
  const long columns = slice.v1 - slice.v0;
  for (long t = 0; t < vp.forward.in.T; ++t) {
    const long out = output_offset(vp.forward.in, slice, t) + slice.v0;
    __builtin_memset(static_cast<In*>(vp.forward.o) + out, 0, columns * sizeof(In));
    if (is_verify(vp)) {
      zero_row(static_cast<T*>(vp.updates) + out, columns);
      if (T* keys = keys_of<T>(vp, slice, t)) zero_row(keys, vp.forward.in.K);
    }
  }
}

// The first pass of a token.
template <int NV, class T, class From>
JET_INLINE void read_state(const Token<T>& token, long K, Rows<From> from, Reading<NV, T>& reading) {
  const T *k = token.k, *q = token.q;
  reading.clear();
  for (long i = 0; i < K; ++i) {
    Vector<T> s[NV];
    from.get(i, s);
    reading.add_row(k[i], q[i], s);
  }
}

// The second pass of a token, and the first pass of `next`.
template <int NV, class T, class From, class To>
JET_INLINE void advance_and_read(const Token<T>& token, const Vector<T> (&u)[NV], const Token<T>& next, long K,
                                 Rows<From> from, Rows<To> to, Reading<NV, T>& reading) {
  const Token<T> copy = token;  // as a store to the state might change the original, for all that the compiler knows
  const T *k = next.k, *q = next.q;
  reading.clear();
  advance<NV>(
      &copy, 1, K, from, to, [&](long, int j) { return u[j]; },
      [&](long i, const auto& s) { reading.add_row(k[i], q[i], s); });
}

// The second pass of a token alone.
template <int NV, class T, class From, class To>
JET_INLINE void advance_by_token(const Token<T>& token, const Vector<T> (&u)[NV], long K, Rows<From> from,
                                 Rows<To> to) {
  const Token<T> copy = token;
  advance<NV>(&copy, 1, K, from, to, [&](long, int j) { return u[j]; }, [](long, const auto&) {});
}

// A call of f(t), whatever f is: what takes one is compiled once for all of them.
class Call {
 public:
  template <class F>
  explicit Call(const F& f) : f_(&f), run_([](const void* g, long t) { (*static_cast<const F*>(g))(t); }) {}
  void operator()(long t) const { run_(f_, t); }

 private:
  const void* f_;
  void (*run_)(const void*, long);
};

// A block of tokens on one stripe, of which some may come before or after. The state is in `pool` before the first
// token of all and after the last, and in `stripe` between tokens; verify has no use for it after the last. load_v(t)
// brings v to item.vo, store_outputs(t) takes o from there and u from item.u.
template <int NV, class T, class St>
__attribute__((noinline)) void recurrent_block(const RecurrentItem<T>& item, bool verify, long count, bool begins,
                                               bool ends, long K, T scale, Rows<St> pool, Rows<T> stripe, Call load_v,
                                               Call store_outputs) {
  const Token<T>* token = item.tokens;
  Reading<NV, T> reading;
  Vector<T> u[NV];
  bool in_pool = begins;
  load_v(0);
  if (in_pool)
    read_state(*token, K, pool, reading);
  else
    read_state(*token, K, stripe, reading);
  for (long t = 0; t + 1 < count; ++t, ++token, in_pool = false) {
    reading.finish(*token, scale, item.vo, u);
    if (verify) Rows<T>{item.u, 0}.put(0, u);
    if (in_pool)
      advance_and_read(*token, u, token[1], K, pool, stripe, reading);
    else
      advance_and_read(*token, u, token[1], K, stripe, stripe, reading);
    store_outputs(t);
    load_v(t + 1);
  }
  reading.finish(*token, scale, item.vo, u);
  if (verify) Rows<T>{item.u, 0}.put(0, u);
  if (!ends && in_pool) advance_by_token(*token, u, K, pool, stripe);
  if (!ends && !in_pool) advance_by_token(*token, u, K, stripe, stripe);
  if (ends && in_pool && !verify) advance_by_token(*token, u, K, pool, pool);
  if (ends && !in_pool && !verify) advance_by_token(*token, u, K, stripe, pool);
  store_outputs(count - 1);  // late: cold lines here would hold up the stores to the state
}

// The same on columns [v, v + columns) of a state of `pool`, whatever its strides.
template <class T, class St>
inline void recurrent_stripe(const RecurrentItem<T>& item, bool verify, long count, bool begins, bool ends, long K,
                             T scale, const StatePool& pool, St* state, long v, long columns, Rows<T> stripe,
                             Call load_v, Call store_outputs) {
  with_vectors<T>(columns, [&](auto vectors) {
    constexpr int NV = decltype(vectors)::value;
    const Rows<St> here{state + v, pool.strides.k};
    if (whole_vectors<T>(pool, columns))
      return recurrent_block<NV>(item, verify, count, begins, ends, K, scale, here, stripe, load_v, store_outputs);
    if (begins) load_state(state, pool.strides, K, v, columns, stripe.data);
    recurrent_block<NV>(item, verify, count, begins, ends, K, scale, stripe, stripe, load_v, store_outputs);
    if (ends && !verify) store_state(stripe.data, pool.strides, K, v, columns, state);
  });
}

// A slice of recurrent_gated_delta_rule, or of its verify.
template <class In, class T, class St>
inline void recurrent_item(const RecurrentGatedDeltaRuleVerifyParams& vp, const Slice& slice, RecurrentItem<T>& item) {
  constexpr long W = Simd<T>::stripe;
  const RecurrentGatedDeltaRuleParams& p = vp.forward;
  const GatedDeltaRuleInputs& in = p.in;
  const bool verify = is_verify(vp);
  const long n = slice.n, h = slice.h, row = row_of(p.pool, n);
  if (row < 0) return write_zeros<In, T>(vp, slice);
  St* pool = at(static_cast<St*>(p.pool.data), p.pool.strides, row, h);
  for (long t0 = 0; t0 < in.T; t0 += kTokens) {
    const long count = in.T - t0 < kTokens ? in.T - t0 : kTokens;
    const bool begins = t0 == 0, ends = t0 + count == in.T;
    load_tokens<In>(in, n, h, t0, count, item);
    if (verify)
      for (long i = 0; i < count; ++i)
        if (T* keys = keys_of<T>(vp, slice, t0 + i)) store_row(item.tokens[i].k, in.K, keys);
    for (long v = slice.v0; v < slice.v1; v += W) {
      const long columns = slice.v1 - v < W ? slice.v1 - v : W;
      const Rows<T> stripe{item.stripes + (v - slice.v0) * in.K, W};
      const auto load_v = [&](long i) {
        load_row(at<In>(in.v, n, t0 + i, h) + v * in.v.strides.d, in.v.strides.d, columns, W, item.vo);
      };
      const auto store_outputs = [&](long i) {
        const long out = output_offset(in, slice, t0 + i) + v;
        store_row(item.vo, columns, static_cast<In*>(p.o) + out);
        if (verify) store_row(item.u, columns, static_cast<T*>(vp.updates) + out);
      };
      recurrent_stripe(item, verify, count, begins, ends, in.K, T(in.scale), p.pool, pool, v, columns, stripe,
                       Call(load_v), Call(store_outputs));
    }
  }
}

template <class In, class T, class St>
inline void recurrent_slices(const RecurrentGatedDeltaRuleVerifyParams& vp, const Parallel& caller) {
  const GatedDeltaRuleInputs& in = vp.forward.in;
  const Parallel parallel = for_work(caller, 3. * in.B * in.T * in.H * in.K * in.V);
  const auto carve = [&](Carver& from, long columns) {
    RecurrentItem<T> item;
    item.carve(from, in.K, columns);
    return item;
  };
  for_slices<T>(parallel, in.B, in.H, in.V, carve,
                [&](const Slice& slice, RecurrentItem<T>& item) { recurrent_item<In, T, St>(vp, slice, item); });
}

inline void recurrent_cpu(const RecurrentGatedDeltaRuleVerifyParams& vp, const Parallel& parallel) {
  const auto with_inputs = [&](auto in) {
    with_fp32_pool(vp.forward.pool.dtype, [&](auto state) {
      recurrent_slices<decltype(in), float, typename decltype(state)::Type>(vp, parallel);
    });
  };
  switch (vp.forward.in.q.dtype) {
    case Dtype::f32: return with_inputs(float());
    case Dtype::f64: JET_CPU_FP64(recurrent_slices<double, double, double>(vp, parallel));
    case Dtype::bf16: return with_inputs(bf16());
    case Dtype::f16: return with_inputs(f16());
  }
}

}  // namespace jet::cpu::JET_CPU_ISA
