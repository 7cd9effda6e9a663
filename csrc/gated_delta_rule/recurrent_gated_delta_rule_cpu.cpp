// The recurrent gated delta rule on a CPU: bound by reading and writing the state once. One work item is a sequence, a value
// head and a slice of V, processed in stripes one register tile wide. A token takes two passes over its stripe: the
// first, from memory, forms S^T k and S^T q together; the second, from L1, updates S. The read-out of the updated state needs
// no third pass, as (e^g S + k u^T)^T q = e^g S^T q + (q.k) u.
#include "csrc/gated_delta_rule/recurrent_gated_delta_rule.h"

#include "csrc/common/cpu/isa.h"
#include "csrc/gated_delta_rule/rows_cpu.h"

namespace jet::cpu::JET_CPU_ISA {

namespace {

// One token of one head, in the arithmetic type.
template <class T>
struct Token {
  const T *q, *k;   // [K] normalised
  T qk, decay, beta;  // <q, k>, e^g
};

// state [K, NV vectors] with rows `ld` apart; vo [NV vectors] is v on entry and o on return
template <class T, int NV, class St>
void step(const Token<T>& token, long K, T scale, St* state, long ld, T* vo) {
  using S = Simd<T>;
  typename S::Vec predicted[NV], read[NV], u[NV];
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) predicted[j] = read[j] = typename S::Vec{};
  for (long i = 0; i < K; ++i) {
    const typename S::Vec k = S::all(token.k[i]), q = S::all(token.q[i]);
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      const typename S::Vec s = load(state + i * ld + j * S::lanes);
      predicted[j] += k * s;
      read[j] += q * s;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < NV; ++j) {
    u[j] = (S::load(vo + j * S::lanes) - predicted[j] * token.decay) * token.beta;
    S::store(vo + j * S::lanes, (read[j] * token.decay + u[j] * token.qk) * scale);
  }
  const typename S::Vec decay = S::all(token.decay);
  for (long i = 0; i < K; ++i) {
    const typename S::Vec k = S::all(token.k[i]);
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      St* s = state + i * ld + j * S::lanes;
      store(s, decay * load(s) + k * u[j]);
    }
  }
}

constexpr long kTokens = 16;  // tokens whose q and k are prepared at a time, shared by the stripes of a head

template <class T>
struct Item {
  long ld;             // K rounded up to whole vectors
  T *q, *k;            // [kTokens, ld]
  T *stripes, *vo;     // [V / W][K, W], [W]
  Token<T> tokens[kTokens];

  void carve(Carver& from, long K, long V) {
    ld = round_up(K, Simd<T>::lanes);
    q = from.take<T>(kTokens * ld), k = from.take<T>(kTokens * ld);
    stripes = from.take<T>(V * K), vo = from.take<T>(Simd<T>::stripe);
  }
};

// item.tokens [count] for the tokens from t
template <class In, class T>
void load_tokens(const RecurrentGatedDeltaRuleParams& p, long n, long h, long t, long count, Item<T>& item) {
  using S = Simd<T>;
  const long hk = h / (p.H / p.Hk);
  for (long i = 0; i < count; ++i) {
    T *q = item.q + i * item.ld, *k = item.k + i * item.ld;
    load_row(at<In>(p.q, p.q_strides, n, t + i, hk), p.q_strides.d, p.K, item.ld, q);
    load_row(at<In>(p.k, p.k_strides, n, t + i, hk), p.k_strides.d, p.K, item.ld, k);
    if (p.l2norm_qk) normalise(q, item.ld), normalise(k, item.ld);
    typename S::Vec qk{};
    for (long j = 0; j < item.ld; j += S::lanes) qk += S::load(q + j) * S::load(k + j);
    item.tokens[i] = {q, k, horizontal_sum<T>(qk), T(__builtin_exp(*at<T>(p.g, p.g_strides, n, t + i, h))),
                      *at<T>(p.beta, p.beta_strides, n, t + i, h)};
  }
}

// Columns [v0, v1) of one sequence and head.
template <class In, class T, class St>
void recurrent_item(const RecurrentGatedDeltaRuleParams& p, long n, long h, long v0, long v1, Item<T>& item) {
  constexpr long W = Simd<T>::stripe;
  const auto output = [&](long t) { return static_cast<In*>(p.o) + ((n * p.T + t) * p.H + h) * p.V; };
  const long pool_row = p.pool.rows == nullptr ? n : static_cast<const int64_t*>(p.pool.rows)[n];
  if (pool_row < 0) {
    for (long t = 0; t < p.T; ++t) __builtin_memset(output(t) + v0, 0, (v1 - v0) * sizeof(In));
    return;
  }
  St* pool = at(static_cast<St*>(p.pool.data), p.pool.strides, pool_row, h);
  const auto columns = [&](long v) { return v1 - v < W ? v1 - v : W; };
  // A single token works on the pool itself, several tokens on a copy that is rounded once at the end.
  const auto direct = [&](long v) { return p.T == 1 && p.pool.strides.v == 1 && columns(v) % Simd<T>::lanes == 0; };
  for (long v = v0; v < v1; v += W)
    if (!direct(v)) load_state(pool, p.pool.strides, p.K, v, columns(v), item.stripes + (v - v0) * p.K);
  for (long t0 = 0; t0 < p.T; t0 += kTokens) {
    const long count = p.T - t0 < kTokens ? p.T - t0 : kTokens;
    load_tokens<In>(p, n, h, t0, count, item);
    for (long v = v0; v < v1; v += W)
      with_vectors<T>(columns(v), [&](auto vectors) {
        constexpr int NV = decltype(vectors)::value;
        for (long i = 0; i < count; ++i) {
          load_row(at<In>(p.v, p.v_strides, n, t0 + i, h) + v * p.v_strides.d, p.v_strides.d, columns(v), W, item.vo);
          if (direct(v))
            step<T, NV>(item.tokens[i], p.K, T(p.scale), pool + v, p.pool.strides.k, item.vo);
          else
            step<T, NV>(item.tokens[i], p.K, T(p.scale), item.stripes + (v - v0) * p.K, W, item.vo);
          store_row(item.vo, columns(v), output(t0 + i) + v);
        }
      });
  }
  for (long v = v0; v < v1; v += W)
    if (!direct(v)) store_state(item.stripes + (v - v0) * p.K, p.pool.strides, p.K, v, columns(v), pool);
}

template <class In, class T, class St>
void recurrent(const RecurrentGatedDeltaRuleParams& p, const Parallel& parallel) {
  constexpr long W = Simd<T>::stripe;
  const long heads = p.N * p.H, stripes = round_up(p.V, W) / W;
  if (heads == 0 || p.T == 0) return;
  long slices = heads < parallel.threads ? (parallel.threads + heads - 1) / heads : 1;
  if (slices > stripes) slices = stripes;
  const long slice = round_up(stripes, slices) / slices * W, items = heads * slices;
  const long workers = parallel.threads < items ? parallel.threads : items;
  Carver count(nullptr);
  Item<T>().carve(count, p.K, slice);
  const Scratch scratch(workers, count.used());
  run_even_tasks(parallel, workers, items, [&](long worker, long i) {
    const long v0 = i % slices * slice, v1 = v0 + slice < p.V ? v0 + slice : p.V;
    Carver from(scratch.of(worker));
    Item<T> item;
    item.carve(from, p.K, slice);
    recurrent_item<In, T, St>(p, i / slices / p.H, i / slices % p.H, v0, v1, item);
  });
}

template <class In>
void recurrent_fp32(const RecurrentGatedDeltaRuleParams& p, const Parallel& parallel) {
  if (p.pool.dtype == Dtype::f32) return recurrent<In, float, float>(p, parallel);
#if defined(__AVX512F__)
  if (has_bf16_instructions()) return recurrent<In, float, NativeBf16>(p, parallel);
#endif
  recurrent<In, float, bf16>(p, parallel);
}

}  // namespace

void recurrent_gated_delta_rule_cpu(const RecurrentGatedDeltaRuleParams& p, const Parallel& parallel) {
  switch (p.dtype) {
    case Dtype::f32: return recurrent_fp32<float>(p, parallel);
    case Dtype::f64: return recurrent<double, double, double>(p, parallel);
    case Dtype::bf16: return recurrent_fp32<bf16>(p, parallel);
    case Dtype::f16: return recurrent_fp32<f16>(p, parallel);
  }
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(recurrent_gated_delta_rule_cpu, RecurrentGatedDeltaRuleParams)
