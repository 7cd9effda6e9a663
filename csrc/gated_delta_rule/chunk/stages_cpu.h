// What the forward and the backward of the chunked gated delta rule do alike: loading a chunk, its decays, K K^T and Q
// K^T, and states as stripes of columns.
#pragma once

#include "csrc/gated_delta_rule/chunk/chunk_gated_delta_rule.h"
#include "csrc/gated_delta_rule/rows_cpu.h"

namespace jet::cpu::JET_CPU_ISA {

constexpr long C = kChunk;

// One sequence of one batch row.
struct Sequence {
  long b, begin, length;  // tokens [begin, begin + length) of batch row b
};

JET_INLINE Sequence sequence(const ChunkGatedDeltaRuleParams& p, long n) {
  if (p.cu_seqlens.data == nullptr) return {n, 0, p.in.T};
  const long begin = index_at(p.cu_seqlens, n);
  return {0, begin, index_at(p.cu_seqlens, n + 1) - begin};
}

// Multiply-adds of a forward: three products with the state, three within a chunk; and states copied in and out.
inline double chunk_work(const ChunkGatedDeltaRuleParams& p) {
  const GatedDeltaRuleInputs& in = p.in;
  const double states = double(in.H) * in.K * in.V, scores = double(in.H) * C * (in.K + in.V);
  return in.B * in.T * (3 * states + scores) + 2 * p.N * states;
}

JET_INLINE StateStrides contiguous_state(const GatedDeltaRuleInputs& in) {
  return {in.H * in.K * in.V, in.K * in.V, in.V, 1};
}

// The part of a chunk that does not depend on V. Rows at and beyond L of q, k (columns of kt) are zero.
template <class T>
struct Chunk {
  long K, ld;              // ld: K rounded up to whole vectors, the padding is zero
  long L;                  // tokens in this chunk, 1 <= L <= C
  T *q, *k;                // [C, ld] normalised
  T* kt;                   // [ld, C] k transposed
  T *kk, *qk;              // [C, C] tril(K K^T, -1) ∘ Γ and tril(Q K^T) ∘ Γ, Γ_ij = e^{c_i - c_j}; zero above
  T* decay;                // [C, C] tril(Γ), zero above
  T *beta, *e_c, *e_rest;  // [C] beta, e^{c_i}, e^{c_L - c_i}; zero at and beyond L
  T *q_factor, *k_factor;  // [C] 1 / sqrt(sum x^2 + eps), or 1 without l2norm
  T e_last;                // e^{c_L}

  void carve(Carver& from, long K_) {
    K = K_, ld = round_up(K, Simd<T>::lanes);
    q = from.take<T>(C * ld), k = from.take<T>(C * ld), kt = from.take<T>(ld * C);
    kk = from.take<T>(C * C), qk = from.take<T>(C * C), decay = from.take<T>(C * C);
    beta = from.take<T>(C), e_c = from.take<T>(C), e_rest = from.take<T>(C);
    q_factor = from.take<T>(C), k_factor = from.take<T>(C);
  }
};

// rows [C, ld] = src rows, normalised when asked for; factor [C] as in Chunk
template <class In, class T>
inline void load_rows(const In* src, const TokenStrides& s, const Chunk<T>& c, bool l2norm, T* rows, T* factor) {
  for (long i = 0; i < c.L; ++i) {
    T* row = rows + i * c.ld;
    load_row(src + i * s.t, s.d, c.K, c.ld, row);
    factor[i] = l2norm ? normalise(row, c.ld) : T(1);
  }
  zero_row(rows + c.L * c.ld, (C - c.L) * c.ld);
}

// beta, e_c, e_rest, e_last, decay from g and beta of L tokens
template <class T>
inline void load_decays(const T* g, long g_stride, const T* beta, long beta_stride, Chunk<T>& c) {
  using S = Simd<T>;
  double sum[C], total = 0;
  alignas(64) T x[C];
  for (long i = 0; i < c.L; ++i) {
    const double gi = g[i * g_stride];
    total += gi < kMinLogDecay ? kMinLogDecay : gi;
    sum[i] = total;
    c.beta[i] = beta[i * beta_stride];
  }
  for (long i = c.L; i < C; ++i) sum[i] = total, c.beta[i] = 0;
  for (long i = 0; i < C; ++i) c.e_c[i] = T(sum[i]), c.e_rest[i] = T(total - sum[i]);
  for (long i = 0; i < C; i += S::lanes) {
    S::store(c.e_c + i, exponential(S::load(c.e_c + i)));
    S::store(c.e_rest + i, exponential(S::load(c.e_rest + i)));
  }
  c.e_last = c.e_c[C - 1];
  zero_row(c.e_c + c.L, C - c.L);
  zero_row(c.e_rest + c.L, C - c.L);
  typename S::Vec lane;
  for (int j = 0; j < S::lanes; ++j) lane[j] = T(j);
  for (long i = 0; i < c.L; ++i)
    for (long j0 = 0; j0 < C; j0 += S::lanes) {
      typename S::Vec gamma{};
      if (j0 <= i) {
        for (int j = 0; j < S::lanes; ++j) x[j] = T(sum[i] - sum[j0 + j]);
        const auto past = lane <= S::all(T(i - j0));
        const typename S::Vec none{};
        gamma = past ? S::load(x) : none;  // masked before exp, so that nothing overflows
        gamma = past ? exponential(gamma) : none;
      }
      S::store(c.decay + i * C + j0, gamma);
    }
}

// out [C, C] = factor tril(out ∘ Γ), without the diagonal when strict; only rows < L. see(at, x) is shown x, what out +
// at held, zero where Γ is.
template <class T, class See>
inline void apply_decay(const Chunk<T>& c, bool strict, T factor, T* out, const See& see) {
  using S = Simd<T>;
  for (long i = 0; i < c.L; ++i) {
    const long end = round_up(i + 1, S::lanes);
    for (long j = 0; j < end; j += S::lanes) {
      const typename S::Vec gamma = S::load(c.decay + i * C + j), none{}, held = S::load(out + i * C + j);
      const typename S::Vec x = gamma != none ? held : none;
      see(i * C + j, x);
      S::store(out + i * C + j, x * gamma * factor);
    }
    zero_row(out + i * C + end, C - end);
    if (strict) out[i * C + i] = T(0);
  }
}

template <class T>
inline void apply_decay(const Chunk<T>& c, bool strict, T* out) {
  apply_decay(c, strict, T(1), out, [](long, const auto&) {});
}

// Everything in Chunk but q, qk, q_factor, for L tokens from `begin` of batch row b and value head h.
template <class In, class T>
inline void prepare_keys(const GatedDeltaRuleInputs& in, long b, long begin, long L, long h, Chunk<T>& c) {
  const long hk = h / (in.H / in.Hk);
  c.L = L;
  load_rows(at<In>(in.k, b, begin, hk), in.k.strides, c, in.l2norm_qk, c.k, c.k_factor);
  load_decays(at<T>(in.g, b, begin, h), in.g.strides.t, at<T>(in.beta, b, begin, h), in.beta.strides.t, c);
  transpose(c.k, c.ld, C, c.ld, c.kt, C);
  // kk = tril(K K^T ∘ Γ, -1)   [C, C]
  gemm<T>(L, C, c.K, T(1), {c.k, c.ld, 1}, {c.kt, C, 1}, false, c.kk, C, Skip::upper_c);
  apply_decay(c, true, c.kk);
}

// Everything in Chunk.
template <class In, class T>
inline void prepare(const GatedDeltaRuleInputs& in, long b, long begin, long L, long h, Chunk<T>& c) {
  prepare_keys<In>(in, b, begin, L, h, c);
  const In* q = at<In>(in.q, b, begin, h / (in.H / in.Hk));
  load_rows(q, in.q.strides, c, in.l2norm_qk, c.q, c.q_factor);
  // qk = tril(Q K^T ∘ Γ)   [C, C]
  gemm<T>(L, C, c.K, T(1), {c.q, c.ld, 1}, {c.kt, C, 1}, false, c.qk, C, Skip::upper_c);
  apply_decay(c, false, c.qk);
}

// dst [C, ld] = diag(factor sign) rows
template <class T>
inline void scale_rows(const Chunk<T>& c, const T* rows, T sign, const T* factors, T* dst) {
  using S = Simd<T>;
  for (long i = 0; i < C; ++i) {
    const typename S::Vec factor = S::all(sign * factors[i]);
    for (long j = 0; j < c.ld; j += S::lanes) S::store(dst + i * c.ld + j, S::load(rows + i * c.ld + j) * factor);
  }
}

// One stripe [C, W] = L rows of `columns` elements, zero beyond
template <class In, class T>
inline void load_stripe(const In* src, const TokenStrides& s, long L, long columns, T* stripe) {
  constexpr long W = Simd<T>::stripe;
  for (long i = 0; i < L; ++i) load_row(src + i * s.t, s.d, columns, W, stripe + i * W);
  zero_row(stripe + L * W, (C - L) * W);
}

}  // namespace jet::cpu::JET_CPU_ISA
