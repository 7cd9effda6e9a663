// Forward of the chunked gated delta rule on a CPU. One work item is a sequence and a value head; it walks over the
// chunks with its state in L2. Per chunk the V columns are processed in stripes one register tile wide, whose part of
// the state, V and U stays in L1, and each stage is one pass over the tile: R is never stored, T is never formed.
#include "csrc/cpu/isa.h"
#include "csrc/gated_delta_rule/chunk/stages_cpu.h"

namespace jet::cpu::JET_CPU_ISA {

namespace {

// Turns the chunk's factors into the left operands of the three products of a stripe.
template <class T>
void fold_factors(T scale, Chunk<T>& c) {
  using S = Simd<T>;
  for (long i = 0; i < c.L; ++i) {
    const T k_row = -c.beta[i] * c.e_c[i], q_row = scale * c.e_c[i];
    for (long j = 0; j < c.ld; j += S::lanes) {
      S::store(c.k + i * c.ld + j, S::load(c.k + i * c.ld + j) * k_row);  // -diag(beta e^c) K
      S::store(c.q + i * c.ld + j, S::load(c.q + i * c.ld + j) * q_row);  // scale diag(e^c) Q
    }
    for (long j = 0; j <= i; j += S::lanes) {
      S::store(c.kk + i * C + j, S::load(c.kk + i * C + j) * -c.beta[i]);  // -diag(beta) kk
      S::store(c.qk + i * C + j, S::load(c.qk + i * C + j) * scale);
    }
  }
  for (long i = 0; i < c.K; ++i)
    for (long j = 0; j < C; j += S::lanes)
      S::store(c.kt + i * C + j, S::load(c.kt + i * C + j) * S::load(c.e_rest + j));  // K^T diag(e^{c_L - c})
}

// u holds diag(beta) V on entry. state [K, W], u [L, W], o [L, W]; W = Simd<T>::stripe, of which NV vectors are used.
template <class T, int NV>
void chunk_stripe(const Chunk<T>& c, T* state, T* u, T* o) {
  constexpr long W = Simd<T>::stripe;
  // U = (I + diag(beta) kk)^-1 (diag(beta) V - diag(beta e^c) K S0)   [L, W], forward substitution by blocks of rows
  for_row_blocks(0, c.L, [&](auto rows, long i) {
    Tile<T, decltype(rows)::value, NV> tile;
    tile.load(u + i * W, W);
    tile.add_product(c.k + i * c.ld, c.ld, 1, state, W, c.K);
    tile.add_product(c.kk + i * C, C, 1, u, W, i);
    tile.solve_lower(c.kk + i * C + i, C, 1);
    tile.store(u + i * W, W);
  });
  // O = scale diag(e^c) Q S0 + P U   [L, W]
  for_row_blocks(0, c.L, [&](auto rows, long i) {
    Tile<T, decltype(rows)::value, NV> tile;
    tile.zero();
    tile.add_product(c.q + i * c.ld, c.ld, 1, state, W, c.K);
    tile.add_product(c.qk + i * C, C, 1, u, W, i);
    tile.template add_triangle_product<false>(c.qk + i * C + i, C, u + i * W, W);
    tile.store(o + i * W, W);
  });
  // S1 = e^{c_L} S0 + K^T diag(e^{c_L - c}) U   [K, W]
  for_row_blocks(0, c.K, [&](auto rows, long i) {
    Tile<T, decltype(rows)::value, NV> tile;
    tile.load_scaled(state + i * W, W, c.e_last);
    tile.add_product(c.kt + i * C, C, 1, u, W, c.L);
    tile.store(state + i * W, W);
  });
}

template <class T>
struct Item {
  Chunk<T> chunk;
  T *state, *u, *o;  // stripes [V / W][K, W], one stripe [C, W] each

  void carve(Carver& from, long K, long stripes) {
    constexpr long W = Simd<T>::stripe;
    chunk.carve(from, K);
    state = from.take<T>(stripes * K * W), u = from.take<T>(C * W), o = from.take<T>(C * W);
  }
};

// Columns [v0, v1) of one sequence and head.
template <class In, class T>
void forward_item(const ChunkGatedDeltaRuleParams& p, long n, long h, long v0, long v1, Item<T>& item) {
  const GatedDeltaRuleInputs& in = p.in;
  constexpr long W = Simd<T>::stripe;
  const Sequence seq = sequence(p, n);
  Chunk<T>& c = item.chunk;
  const auto columns = [&](long v) { return in.V - v < W ? in.V - v : W; };
  const T* initial = at<T>(p.initial_state, n, h);
  for (long v = v0; v < v1; v += W)
    load_state(initial, p.initial_state.strides, in.K, v, columns(v), item.state + (v - v0) * in.K);
  for (long t = 0; t < seq.length; t += C) {
    const long begin = seq.begin + t;
    prepare<In>(in, seq.b, begin, seq.length - t < C ? seq.length - t : C, h, c);
    fold_factors(T(in.scale), c);
    const long next = seq.length - t - C < C ? seq.length - t - C : C;
    const long hk = h / (in.H / in.Hk);
    prefetch_rows(at<In>(in.q, seq.b, begin + C, hk), in.q.strides, next, in.K);
    prefetch_rows(at<In>(in.k, seq.b, begin + C, hk), in.k.strides, next, in.K);
    for (long v = v0; v < v1; v += W) {
      prefetch_rows(at<In>(in.v, seq.b, begin + C, h) + v * in.v.strides.d, in.v.strides, next, columns(v));
      const In* values = at<In>(in.v, seq.b, begin, h) + v * in.v.strides.d;
      In* o = static_cast<In*>(p.o) + ((seq.b * in.T + begin) * in.H + h) * in.V + v;
      for (long i = 0; i < c.L; ++i) {
        T* row = item.u + i * W;
        load_row(values + i * in.v.strides.t, in.v.strides.d, columns(v), W, row);
        for (long j = 0; j < W; ++j) row[j] *= c.beta[i];
      }
      with_vectors<T>(columns(v), [&](auto vectors) {
        chunk_stripe<T, decltype(vectors)::value>(c, item.state + (v - v0) * in.K, item.u, item.o);
      });
      for (long i = 0; i < c.L; ++i) store_row(item.o + i * W, columns(v), o + i * in.H * in.V);
    }
  }
  const StateStrides dense = contiguous_state(in);
  T* final_state = at(static_cast<T*>(p.final_state), dense, n, h);
  for (long v = v0; v < v1; v += W) store_state(item.state + (v - v0) * in.K, dense, in.K, v, columns(v), final_state);
}

template <class In, class T>
void forward(const ChunkGatedDeltaRuleParams& p, const Parallel& caller) {
  const GatedDeltaRuleInputs& in = p.in;
  const Parallel parallel = for_work(caller, chunk_work(p));
  constexpr long W = Simd<T>::stripe;
  const long heads = p.N * in.H, stripes = round_up(in.V, W) / W;
  if (heads == 0) return;
  // Fewer heads than threads: slices of V, each repeating the part of a chunk that does not depend on V.
  long slices = heads < parallel.threads ? (parallel.threads + heads - 1) / heads : 1;
  if (slices > stripes) slices = stripes;
  const long slice = round_up(stripes, slices) / slices * W, items = heads * slices;
  const long workers = parallel.threads < items ? parallel.threads : items;
  Carver count(nullptr);
  Item<T>().carve(count, in.K, slice / W);
  const Scratch scratch(workers, count.used());
  run_tasks(parallel, workers, items, [&](long worker, long i) {
    const long v0 = i % slices * slice, v1 = v0 + slice < in.V ? v0 + slice : in.V;
    Carver from(scratch.of(worker));
    Item<T> item;
    item.carve(from, in.K, slice / W);
    forward_item<In, T>(p, i / slices % p.N, i / slices / p.N, v0, v1, item);
  });
}

}  // namespace

void chunk_gated_delta_rule_cpu(const ChunkGatedDeltaRuleParams& p, const Parallel& parallel) {
  switch (p.in.q.dtype) {
    case Dtype::f32: return forward<float, float>(p, parallel);
    case Dtype::f64: JET_CPU_FP64(forward<double, double>(p, parallel));
    case Dtype::bf16: return forward<bf16, float>(p, parallel);
    case Dtype::f16: return forward<f16, float>(p, parallel);
  }
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(chunk_gated_delta_rule_cpu, ChunkGatedDeltaRuleParams, params.in.q.dtype)
