// Commit on a CPU: one pass over the states, each row in registers while the accepted tokens are added to it.
#include "csrc/gated_delta_rule/recurrent/recurrent_gated_delta_rule_commit.h"

#include "csrc/cpu/isa.h"
#include "csrc/gated_delta_rule/recurrent_item_cpu.h"

namespace jet::cpu::JET_CPU_ISA {

namespace {

template <class T>
struct CommitItem {
  Token<T>* tokens;  // [T] of which k and decay are used
  T *u, *stripe;     // [T, W], [K, W]

  void carve(Carver& from, long tokens_, long K) {
    constexpr long W = Simd<T>::stripe;
    tokens = from.take<Token<T>>(tokens_), u = from.take<T>(tokens_ * W), stripe = from.take<T>(K * W);
  }
};

template <class T, class St>
void commit_item(const RecurrentGatedDeltaRuleCommitParams& p, const Slice& slice, CommitItem<T>& item) {
  constexpr long W = Simd<T>::stripe;
  const long row = row_of(p.pool, slice.n), count = index_at(p.num_accepted, slice.n);
  if (row < 0 || count == 0) return;
  St* pool = at(static_cast<St*>(p.pool.data), p.pool.strides, row, slice.h);
  const T* keys = static_cast<const T*>(p.keys) + (slice.n * p.T * p.Hk + slice.h / (p.H / p.Hk)) * p.K;
  const T* updates = static_cast<const T*>(p.updates) + (slice.n * p.T * p.H + slice.h) * p.V;
  for (long t = 0; t < count; ++t)
    item.tokens[t] = {nullptr, keys + t * p.Hk * p.K, 0, decay_of<T>(p.g, slice.n, t, slice.h), 0};
  for (long v = slice.v0; v < slice.v1; v += W) {
    const long columns = slice.v1 - v < W ? slice.v1 - v : W;
    for (long t = 0; t < count; ++t) load_row(updates + t * p.H * p.V + v, 1, columns, W, item.u + t * W);
    with_vectors<T>(columns, [&](auto vectors) {
      constexpr int NV = decltype(vectors)::value;
      const auto u = [&](long t, int j) { return Simd<T>::load(item.u + t * W + j * Simd<T>::lanes); };
      const auto add_tokens = [&](auto rows) {
        advance<NV>(item.tokens, count, p.K, rows, rows, u, [](long, const auto&) {});
      };
      if (whole_vectors<T>(p.pool, columns)) return add_tokens(Rows<St>{pool + v, p.pool.strides.k});
      load_state(pool, p.pool.strides, p.K, v, columns, item.stripe);
      add_tokens(Rows<T>{item.stripe, W});
      store_state(item.stripe, p.pool.strides, p.K, v, columns, pool);
    });
  }
}

template <class T, class St>
void commit(const RecurrentGatedDeltaRuleCommitParams& p, const Parallel& caller) {
  const Parallel parallel = for_work(caller, double(p.N) * p.H * p.K * p.V * (p.T + 1));
  const auto carve = [&](Carver& from, long) {
    CommitItem<T> item;
    item.carve(from, p.T, p.K);
    return item;
  };
  for_slices<T>(parallel, p.N, p.H, p.V, carve,
                [&](const Slice& slice, CommitItem<T>& item) { commit_item<T, St>(p, slice, item); });
}

}  // namespace

void recurrent_gated_delta_rule_commit_cpu(const RecurrentGatedDeltaRuleCommitParams& p, const Parallel& parallel) {
  if (p.pool.dtype == Dtype::f64) JET_CPU_FP64(commit<double, double>(p, parallel));
  with_fp32_pool(p.pool.dtype, [&](auto state) { commit<float, typename decltype(state)::Type>(p, parallel); });
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(recurrent_gated_delta_rule_commit_cpu, RecurrentGatedDeltaRuleCommitParams, params.pool.dtype)
