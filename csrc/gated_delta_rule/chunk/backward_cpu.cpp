// Backward of the chunked gated delta rule on a CPU: a reverse sweep over the chunks without a division by beta or by a
// decay.
//
// With U = diag(beta) U', P = scale tril(Q K^T ∘ Γ), Γ_ij = e^{c_i-c_j}, and dS the gradient of the state after the
// chunk:
//   dU = P^T dO + diag(e^{c_L-c}) K dS     X = T^T dU      dV = beta X      dbeta = rowsum(U' ∘ X)
//   dP = scale tril(dO U^T) ∘ Γ            dM = -tril(dV U^T, -1) ∘ Γ
//   dQ = scale e^c (dO S0^T) + dP K        dK_row = -e^c (dV S0^T) + dM K
//   dK_st = e^{c_L-c} (U dS^T)             dK_col = dP^T Q + dM^T K + dK_st         dK = dK_row + dK_col
//   dS <- e^{c_L} dS + Q^T diag(scale e^c) dO - K^T diag(e^c) dV
// g_t decays what passes from before token t to t or later: with Y = tril(dP ∘ Q K^T + dM ∘ K K^T, -1) and the parts of
// <q,dQ> and <k,dK_row> that come from S0, read_i = <q_i, scale e^{c_i} S0 dO_i> - <k_i, e^{c_i} S0 dV_i>,
//   dg_t = sum_{j<t<=i} Y_ij + sum_{t<=i} read_i + sum_{j<t} <k_j, dK_st,j> + e^{c_L} <S0,dS>
// Each term has e^{g_t} as a factor and none cancels another exactly, so that dg keeps its relative accuracy at any
// decay; as a reverse cumulative sum of <q,dQ> + <k,dK_row> - <k,dK_col> it would not. The gradients of q and k are
// formed transposed, [K, C], so that the tokens lie along the vectors: the factors per token, the dots and the l2norm
// are then vertical operations, and the right operands are dO^T, dV^T and U^T.
//
// In the names of flash-linear-attention: chunk_bwd_dhu (dS), chunk_bwd_dv_local, prepare_wy_repr_bwd (X, dV, dbeta),
// chunk_bwd_dqkwg. One work item is a sequence and a query/key head with the value heads that share it, so that dq and
// dk are summed in a fixed order. S0 and U' of every chunk are recomputed by segments: kSegmentBytes (or sqrt(chunks)
// chunks, if that is more) for one segment, and one state per segment, for each thread.
#include "csrc/cpu/isa.h"
#include "csrc/gated_delta_rule/chunk/stages_cpu.h"

namespace jet::cpu::JET_CPU_ISA {

namespace {

constexpr long kSegmentBytes = 32l << 20;

// Sizes of one item.
struct Plan {
  long heads, K, V, stripes, state, values;  // state, values: elements of S and of U' in stripes
  long chunks, segment, segments;            // of the longest sequence; chunks per segment
};

template <class T>
Plan make_plan(const ChunkGatedDeltaRuleParams& p) {
  const GatedDeltaRuleInputs& in = p.in;
  const long stripes = round_up(in.V, Simd<T>::stripe) / Simd<T>::stripe;
  Plan plan{.heads = in.H / in.Hk,
            .K = in.K,
            .V = in.V,
            .stripes = stripes,
            .state = stripes * in.K * Simd<T>::stripe,
            .values = stripes * C * Simd<T>::stripe,
            .chunks = 0,
            .segment = 1,
            .segments = 1};
  for (long n = 0; n < p.N; ++n) {
    const long chunks = (sequence(p, n).length + C - 1) / C;
    if (chunks > plan.chunks) plan.chunks = chunks;
  }
  plan.segment = kSegmentBytes / (plan.heads * (plan.state + plan.values) * long(sizeof(T)));
  while (plan.segment * plan.segment < plan.chunks) ++plan.segment;
  if (plan.segment > plan.chunks) plan.segment = plan.chunks;
  if (plan.segment > 0) plan.segments = (plan.chunks + plan.segment - 1) / plan.segment;
  return plan;
}

template <class T>
struct Item {
  Plan plan;
  Chunk<T> chunk;
  T *k_in, *k_out, *q_in,
      *rows;          // [C, ld] -diag(e^c) K, diag(e^{c_L-c}) K, scale diag(e^c) Q; a gradient before it is stored
  T *qt, *dqt, *dkt;  // [ld, C] q and the gradients of normalised q and k, transposed
  T *m, *dp, *dm, *dpt, *dmt;  // [C, C] -diag(beta) kk or -kk diag(beta); dP, dM and their transposes
  T *q_column, *k_column;      // [C] scale e^c, -e^c
  T *dbeta, *read, *stored;    // [C] read_j and <k_j, dK_st,j>
  T* y;                        // [C, C] Y
  T *grad_o, *x;               // [V / W][C, W] dO; X, then dV
  T *grad_o_t, *dv_t, *u_t;    // [V, C] transposed dO, dV, U
  T* ds;                       // [heads][V / W][K, W]
  T* checkpoints;              // [heads][segments][V / W][K, W] S at the start of each segment
  T *states, *u;               // [heads][segment][V / W][K, W] S0 of each chunk but the first, [C, W] U'

  void carve(Carver& from, const Plan& plan_) {
    plan = plan_;
    chunk.carve(from, plan.K);
    T** const rows_like[] = {&k_in, &k_out, &q_in, &rows, &qt, &dqt, &dkt};
    T** const square[] = {&m, &dp, &dm, &dpt, &dmt, &y};
    T** const column[] = {&q_column, &k_column, &dbeta, &read, &stored};
    T** const values_like[] = {&grad_o, &x, &grad_o_t, &dv_t, &u_t};
    for (T** array : rows_like) *array = from.take<T>(C * chunk.ld);
    for (T** array : square) *array = from.take<T>(C * C);
    for (T** array : column) *array = from.take<T>(C);
    for (T** array : values_like) *array = from.take<T>(plan.values);
    ds = from.take<T>(plan.heads * plan.state);
    checkpoints = from.take<T>(plan.heads * plan.segments * plan.state);
    states = from.take<T>(plan.heads * plan.segment * plan.state);
    u = from.take<T>(plan.heads * plan.segment * plan.values);
  }

  T* checkpoint(long head, long segment) const { return checkpoints + (head * plan.segments + segment) * plan.state; }
  // S0 and U' of chunk i of a segment
  T* state(long head, long segment, long i) const {
    return i == 0 ? checkpoint(head, segment) : states + (head * plan.segment + i - 1) * plan.state;
  }
  T* values(long head, long i) const { return u + (head * plan.segment + i) * plan.values; }
};

template <class T>
long columns(const Plan& plan, long stripe) {
  const long left = plan.V - stripe * Simd<T>::stripe;
  return left < Simd<T>::stripe ? left : Simd<T>::stripe;
}

// --- Forward again: U' and the next state

// u holds V on entry and U' on return; next (null: not wanted) may be state.
template <class T, int NV>
void advance_stripe(const Item<T>& item, const T* state, T* u, T* next) {
  constexpr long W = Simd<T>::stripe;
  const Chunk<T>& c = item.chunk;
  // U' = (I + kk diag(beta))^-1 (V - diag(e^c) K S0)   [L, W]
  for_row_blocks(0, c.L, [&](auto rows, long i) {
    Tile<T, decltype(rows)::value, NV> tile;
    tile.load(u + i * W, W);
    tile.add_product(item.k_in + i * c.ld, c.ld, 1, state, W, c.K);
    tile.add_product(item.m + i * C, C, 1, u, W, i);
    tile.solve_lower(item.m + i * C + i, C, 1);
    tile.store(u + i * W, W);
  });
  if (next == nullptr) return;
  // S1 = e^{c_L} S0 + K^T diag(e^{c_L-c} beta) U'   [K, W]
  for_row_blocks(0, c.K, [&](auto rows, long i) {
    Tile<T, decltype(rows)::value, NV> tile;
    tile.load_scaled(state + i * W, W, c.e_last);
    tile.add_product(item.k_out + i, 1, c.ld, u, W, c.L);
    tile.store(next + i * W, W);
  });
}

template <class In, class T>
void advance(const GatedDeltaRuleInputs& in, long b, long begin, long L, long h, Item<T>& item, const T* state, T* u,
             T* next) {
  using S = Simd<T>;
  constexpr long W = S::stripe;
  Chunk<T>& c = item.chunk;
  prepare_keys<In>(in, b, begin, L, h, c);
  scale_rows(c, c.k, T(-1), c.e_c, item.k_in);
  alignas(64) T write[C];
  for (long i = 0; i < C; ++i) write[i] = c.beta[i] * c.e_rest[i];
  scale_rows(c, c.k, T(1), write, item.k_out);
  for (long i = 0; i < L; ++i)
    for (long j = 0; j < C; j += S::lanes)
      S::store(item.m + i * C + j, -S::load(c.kk + i * C + j) * S::load(c.beta + j));
  const In* v = at<In>(in.v, b, begin, h);
  for (long s = 0; s < item.plan.stripes; ++s) {
    load_stripe(v + s * W * in.v.strides.d, in.v.strides, L, columns<T>(item.plan, s), u + s * C * W);
    with_vectors<T>(columns<T>(item.plan, s), [&](auto vectors) {
      advance_stripe<T, decltype(vectors)::value>(item, state + s * c.K * W, u + s * C * W,
                                                  next == nullptr ? nullptr : next + s * c.K * W);
    });
  }
}

// --- One chunk of the reverse sweep

// X = T^T (P^T dO + diag(e^{c_L-c}) K dS)   [L, W], backward substitution by blocks of rows
template <class T, int NV>
void solve_stripe(const Item<T>& item, const T* grad_o, const T* ds, T* x) {
  constexpr long W = Simd<T>::stripe;
  const Chunk<T>& c = item.chunk;
  for_row_blocks_upwards(0, c.L, [&](auto rows, long i) {
    constexpr int R = decltype(rows)::value;
    Tile<T, R, NV> tile;
    tile.zero();
    tile.template add_triangle_product<true>(c.qk + i * C + i, C, grad_o + i * W, W);
    tile.add_product(c.qk + (i + R) * C + i, 1, C, grad_o + (i + R) * W, W, c.L - i - R);
    tile.add_product(item.k_out + i * c.ld, c.ld, 1, ds, W, c.K);
    tile.add_product(item.m + (i + R) * C + i, 1, C, x + (i + R) * W, W, c.L - i - R);
    tile.solve_upper(item.m + i * C + i, 1, C);
    tile.store(x + i * W, W);
  });
}

// dS <- e^{c_L} dS + Q^T diag(scale e^c) dO - K^T diag(e^c) dV   [K, W]
template <class T, int NV>
void update_stripe(const Item<T>& item, const T* grad_o, const T* dv, T* ds) {
  constexpr long W = Simd<T>::stripe;
  const Chunk<T>& c = item.chunk;
  for_row_blocks(0, c.K, [&](auto rows, long i) {
    Tile<T, decltype(rows)::value, NV> tile;
    tile.load_scaled(ds + i * W, W, c.e_last);
    tile.add_product(item.q_in + i, 1, c.ld, grad_o, W, c.L);
    tile.add_product(item.k_in + i, 1, c.ld, dv, W, c.L);
    tile.store(ds + i * W, W);
  });
}

// item.dbeta = rowsum(U' ∘ X), then x <- dV = diag(beta) X
template <class T>
void finish_values(const Item<T>& item, const T* u) {
  using S = Simd<T>;
  constexpr long W = S::stripe;
  for (long i = 0; i < item.chunk.L; ++i) {
    typename S::Vec sum{};
    for (long s = 0; s < item.plan.stripes; ++s)
      for (long j = s * C * W + i * W; j < s * C * W + i * W + W; j += S::lanes) {
        const typename S::Vec x = S::load(item.x + j);
        sum += S::load(u + j) * x;
        S::store(item.x + j, x * item.chunk.beta[i]);
      }
    item.dbeta[i] = horizontal_sum<T>(sum);
  }
}

// out [C, C] = sign scale tril(rows U^T) ∘ Γ for rows [V / W][C, W], the gradient of a product of rows of q or k with
// k, and its transpose; without the diagonal when strict. Adds that gradient times that product to Y: `score` is the
// product times scale Γ.
template <class T>
void score_gradient(const Item<T>& item, const T* rows, T sign, T scale, const T* score, bool strict, T* out,
                    T* out_t) {
  using S = Simd<T>;
  constexpr long W = S::stripe;
  const Chunk<T>& c = item.chunk;
  for (long s = 0; s < item.plan.stripes; ++s)
    gemm<T>(c.L, C, columns<T>(item.plan, s), sign, {rows + s * C * W, W, 1}, {item.u_t + s * W * C, C, 1}, s > 0, out,
            C, Skip::upper_c);
  apply_decay(c, strict, scale, out, [&](long at, typename S::Vec products) __attribute__((always_inline)) {
    S::store(item.y + at, S::load(item.y + at) + products * S::load(score + at));
  });
  zero_row(out + c.L * C, (C - c.L) * C);
  transpose(out, C, C, C, out_t, C);
}

// The products over V and over the chunk that give dQ^T and dK^T [K, C]; adds to dqt, dkt, read, stored.
template <class T>
void key_gradients(const Item<T>& item, const T* s0, const T* ds) {
  using S = Simd<T>;
  constexpr long W = S::stripe;
  constexpr int NV = kTileVectors;
  const Chunk<T>& c = item.chunk;
  for (long j = 0; j < C; j += W)
    for_row_blocks(0, c.K, [&](auto rows, long i) {
      using RowTile = Tile<T, decltype(rows)::value, NV>;
      const auto over_v = [&](RowTile& tile, const T* state, const T* right) __attribute__((always_inline)) {
        tile.zero();
        for (long s = 0; s < item.plan.stripes; ++s)
          tile.add_product(state + s * c.K * W + i * W, W, 1, right + s * W * C + j, C, columns<T>(item.plan, s));
      };
      const long past = j + W < c.L ? j + W : c.L;  // dP^T(l, j) = 0 for l > j
      const long future = j < c.L ? c.L - j : 0;    // dP(l, j) = 0 for l < j
      RowTile tile;
      // dQ^T = (S0 dO^T) diag(scale e^c) + K^T dP^T
      over_v(tile, s0, item.grad_o_t);
      tile.scale_columns(item.q_column + j);
      tile.dot_columns(item.qt + i * C + j, C, item.read + j);
      tile.add_product(c.k + i, 1, c.ld, item.dpt + j, C, past);
      tile.add_to(item.dqt + i * C + j, C);
      // dK_row^T = -(S0 dV^T) diag(e^c) + K^T dM^T
      over_v(tile, s0, item.dv_t);
      tile.scale_columns(item.k_column + j);
      tile.dot_columns(c.kt + i * C + j, C, item.read + j);
      tile.add_product(c.k + i, 1, c.ld, item.dmt + j, C, past);
      tile.add_to(item.dkt + i * C + j, C);
      // dK_col^T = dK_st^T + Q^T dP + K^T dM, dK_st^T = (dS U^T) diag(e^{c_L-c})
      over_v(tile, ds, item.u_t);
      tile.scale_columns(c.e_rest + j);
      tile.dot_columns(c.kt + i * C + j, C, item.stored + j);
      tile.add_product(c.q + i + j * c.ld, 1, c.ld, item.dp + j * C + j, C, future);
      tile.add_product(c.k + i + j * c.ld, 1, c.ld, item.dm + j * C + j, C, future);
      tile.add_to(item.dkt + i * C + j, C);
    });
}

// <a, b> of two states in stripes; the vectors of a stripe beyond V hold nothing
template <class T>
T state_dot(const Plan& plan, const T* a, const T* b) {
  using S = Simd<T>;
  constexpr long W = S::stripe;
  typename S::Vec sum{};
  for (long s = 0; s < plan.stripes; ++s)
    for (long i = s * plan.K * W; i < (s + 1) * plan.K * W; i += W)
      for (long j = i; j < i + columns<T>(plan, s); j += S::lanes) sum += S::load(a + j) * S::load(b + j);
  return horizontal_sum<T>(sum);
}

// dg of L tokens, `dg_stride` apart, from Y, read, stored and through = e^{c_L} <S0,dS>; zero where g is clamped.
template <class T>
void gate_gradient(const Item<T>& item, T through, const T* g, long g_stride, T* dg, long dg_stride) {
  using S = Simd<T>;
  const long L = item.chunk.L;
  alignas(64) T below[C] = {};  // sum_{t<=i} Y_ij for j < t
  double stored_before[C], stored = 0, read = 0;
  for (long t = 0; t < L; ++t) stored_before[t] = stored, stored += item.stored[t];
  typename S::Vec lane;
  for (int j = 0; j < S::lanes; ++j) lane[j] = T(j);
  for (long t = L - 1; t >= 0; --t) {
    typename S::Vec across{};
    const typename S::Vec none{};
    for (long j = 0; j < t; j += S::lanes) {
      const typename S::Vec sum = S::load(below + j) + S::load(item.y + t * C + j);
      S::store(below + j, sum);
      const auto before = lane < S::all(T(t - j));
      across += before ? sum : none;
    }
    read += item.read[t];
    const double gradient = double(horizontal_sum<T>(across)) + read + stored_before[t] + through;
    dg[t * dg_stride] = g[t * g_stride] < kMinLogDecay ? T(0) : T(gradient);
  }
}

template <class T>
void fold_factors(T scale, Item<T>& item) {
  using S = Simd<T>;
  Chunk<T>& c = item.chunk;
  for (long i = 0; i < C; ++i) item.q_column[i] = scale * c.e_c[i], item.k_column[i] = -c.e_c[i];
  scale_rows(c, c.q, T(1), item.q_column, item.q_in);
  scale_rows(c, c.k, T(1), item.k_column, item.k_in);
  scale_rows(c, c.k, T(1), c.e_rest, item.k_out);
  for (long i = 0; i < c.L; ++i)
    for (long j = 0; j < C; j += S::lanes) {
      S::store(c.qk + i * C + j, S::load(c.qk + i * C + j) * scale);
      S::store(item.m + i * C + j, S::load(c.kk + i * C + j) * -c.beta[i]);
    }
  transpose(c.q, c.ld, C, c.ld, item.qt, C);
}

// Everything of one chunk and value head but the end of dq and dk, which the heads of a group share.
template <class In, class T>
void sweep_chunk(const ChunkGatedDeltaRuleBackwardParams& bp, long b, long begin, long L, long h, Item<T>& item,
                 const T* s0, const T* u, T* ds) {
  using S = Simd<T>;
  constexpr long W = S::stripe;
  const GatedDeltaRuleInputs& in = bp.forward.in;
  Chunk<T>& c = item.chunk;
  prepare<In>(in, b, begin, L, h, c);
  fold_factors(T(in.scale), item);
  const In* grad_o = at<In>(bp.grad_o, b, begin, h);
  for (long s = 0; s < item.plan.stripes; ++s) {
    T *go = item.grad_o + s * C * W, *x = item.x + s * C * W;
    load_stripe(grad_o + s * W * bp.grad_o.strides.d, bp.grad_o.strides, L, columns<T>(item.plan, s), go);
    zero_row(x, C * W);
    with_vectors<T>(columns<T>(item.plan, s),
                    [&](auto vectors) { solve_stripe<T, decltype(vectors)::value>(item, go, ds + s * c.K * W, x); });
  }
  finish_values(item, u);
  for (long s = 0; s < item.plan.stripes; ++s) {
    transpose(item.grad_o + s * C * W, W, C, W, item.grad_o_t + s * W * C, C);
    transpose(item.x + s * C * W, W, C, W, item.dv_t + s * W * C, C);
    transpose(u + s * C * W, W, C, W, item.u_t + s * W * C, C);
  }
  for (long j = 0; j < item.plan.values; j += S::lanes)  // U = diag(beta) U'
    S::store(item.u_t + j, S::load(item.u_t + j) * S::load(c.beta + j % C));
  zero_row(item.y, C * C);
  score_gradient(item, item.grad_o, T(1), T(in.scale), c.qk, false, item.dp, item.dpt);
  score_gradient(item, item.x, T(-1), T(1), c.kk, true, item.dm, item.dmt);
  zero_row(item.read, C);
  zero_row(item.stored, C);
  key_gradients(item, s0, ds);
  const T* g = at<T>(in.g, b, begin, h);
  T* dg = static_cast<T*>(bp.dg) + (b * in.T + begin) * in.H + h;
  gate_gradient(item, c.e_last * state_dot(item.plan, s0, ds), g, in.g.strides.t, dg, in.H);
  T* dbeta = static_cast<T*>(bp.dbeta) + (b * in.T + begin) * in.H + h;
  for (long i = 0; i < L; ++i) dbeta[i * in.H] = item.dbeta[i];

  In* dv = static_cast<In*>(bp.dv) + ((b * in.T + begin) * in.H + h) * in.V;
  for (long s = 0; s < item.plan.stripes; ++s) {
    for (long i = 0; i < L; ++i)
      store_row(item.x + (s * C + i) * W, columns<T>(item.plan, s), dv + i * in.H * in.V + s * W);
    with_vectors<T>(columns<T>(item.plan, s), [&](auto vectors) {
      update_stripe<T, decltype(vectors)::value>(item, item.grad_o + s * C * W, item.x + s * C * W, ds + s * c.K * W);
    });
  }
}

// Stores L rows of a gradient that is held transposed, through the l2norm x -> xt = x factor.
template <class In, class T>
void store_gradient(const Item<T>& item, bool l2norm, const T* xt, const T* factor, T* grad_t, In* out, long stride) {
  using S = Simd<T>;
  const Chunk<T>& c = item.chunk;
  if (l2norm)
    for (long j = 0; j < C; j += S::lanes) {
      typename S::Vec along{};
      for (long i = 0; i < c.K; ++i) along += S::load(xt + i * C + j) * S::load(grad_t + i * C + j);
      for (long i = 0; i < c.K; ++i) {
        T* g = grad_t + i * C + j;
        S::store(g, (S::load(g) - S::load(xt + i * C + j) * along) * S::load(factor + j));
      }
    }
  transpose(grad_t, C, c.ld, C, item.rows, c.ld);
  for (long i = 0; i < c.L; ++i) store_row(item.rows + i * c.ld, c.K, out + i * stride);
}

// --- One work item

template <class In, class T>
void backward_item(const ChunkGatedDeltaRuleBackwardParams& bp, long n, long hk, Item<T>& item) {
  constexpr long W = Simd<T>::stripe;
  const ChunkGatedDeltaRuleParams& p = bp.forward;
  const GatedDeltaRuleInputs& in = p.in;
  const Plan& plan = item.plan;
  const Sequence seq = sequence(p, n);
  const long chunks = (seq.length + C - 1) / C, h0 = hk * plan.heads;
  const auto tokens = [&](long m) { return seq.length - m * C < C ? seq.length - m * C : C; };
  for (long i = 0; i < plan.heads; ++i) {
    const T* initial = at<T>(p.initial_state, n, h0 + i);
    const T* final = at<T>(bp.grad_final_state, n, h0 + i);
    for (long s = 0; s < plan.stripes; ++s) {
      const long offset = s * in.K * W, v = s * W, width = columns<T>(plan, s);
      load_state(initial, p.initial_state.strides, in.K, v, width, item.checkpoint(i, 0) + offset);
      load_state(final, bp.grad_final_state.strides, in.K, v, width, item.ds + i * plan.state + offset);
    }
  }
  // The states at the start of the segments.
  const long last_segment = chunks > 0 ? (chunks - 1) / plan.segment : 0;
  for (long i = 0; i < plan.heads; ++i)
    for (long m = 0; m < last_segment * plan.segment; ++m) {
      const long segment = m / plan.segment;
      T* next = item.checkpoint(i, segment + 1);
      const T* state = m % plan.segment == 0 ? item.checkpoint(i, segment) : next;
      advance<In>(in, seq.b, seq.begin + m * C, tokens(m), h0 + i, item, state, item.values(i, 0), next);
    }
  for (long end = chunks; end > 0;) {
    const long segment = (end - 1) / plan.segment, first = segment * plan.segment;
    for (long i = 0; i < plan.heads; ++i)
      for (long m = first; m < end; ++m)
        advance<In>(in, seq.b, seq.begin + m * C, tokens(m), h0 + i, item, item.state(i, segment, m - first),
                    item.values(i, m - first), m + 1 < end ? item.state(i, segment, m - first + 1) : nullptr);
    for (long m = end - 1; m >= first; --m) {
      const long begin = seq.begin + m * C, at_k = ((seq.b * in.T + begin) * in.Hk + hk) * in.K;
      zero_row(item.dqt, C * item.chunk.ld);
      zero_row(item.dkt, C * item.chunk.ld);
      for (long i = 0; i < plan.heads; ++i)
        sweep_chunk<In>(bp, seq.b, begin, tokens(m), h0 + i, item, item.state(i, segment, m - first),
                        item.values(i, m - first), item.ds + i * plan.state);
      const Chunk<T>& c = item.chunk;
      store_gradient(item, in.l2norm_qk, item.qt, c.q_factor, item.dqt, static_cast<In*>(bp.dq) + at_k, in.Hk * in.K);
      store_gradient(item, in.l2norm_qk, c.kt, c.k_factor, item.dkt, static_cast<In*>(bp.dk) + at_k, in.Hk * in.K);
    }
    end = first;
  }
  const StateStrides dense = contiguous_state(in);
  for (long i = 0; i < plan.heads; ++i)
    for (long s = 0; s < plan.stripes; ++s)
      store_state(item.ds + i * plan.state + s * in.K * W, dense, in.K, s * W, columns<T>(plan, s),
                  at(static_cast<T*>(bp.dinitial_state), dense, n, h0 + i));
}

template <class In, class T>
void backward(const ChunkGatedDeltaRuleBackwardParams& bp, const Parallel& caller) {
  const ChunkGatedDeltaRuleParams& p = bp.forward;
  const GatedDeltaRuleInputs& in = p.in;
  const Parallel parallel = for_work(caller, 4 * chunk_work(p));
  const long items = p.N * in.Hk, workers = parallel.threads < items ? parallel.threads : items;
  if (in.H == 0) {
    __builtin_memset(bp.dq, 0, in.B * in.T * in.Hk * in.K * sizeof(In));
    __builtin_memset(bp.dk, 0, in.B * in.T * in.Hk * in.K * sizeof(In));
    return;
  }
  if (items == 0) return;
  const Plan plan = make_plan<T>(p);
  Carver count(nullptr);
  Item<T>().carve(count, plan);
  const Scratch scratch(workers, count.used());
  run_tasks(parallel, workers, items, [&](long worker, long i) {
    Carver from(scratch.of(worker));
    Item<T> item;
    item.carve(from, plan);
    backward_item<In, T>(bp, i % p.N, i / p.N, item);
  });
}

}  // namespace

void chunk_gated_delta_rule_backward_cpu(const ChunkGatedDeltaRuleBackwardParams& p, const Parallel& parallel) {
  switch (p.forward.in.q.dtype) {
    case Dtype::f32: return backward<float, float>(p, parallel);
    case Dtype::f64: JET_CPU_FP64(backward<double, double>(p, parallel));
    case Dtype::bf16: return backward<bf16, float>(p, parallel);
    case Dtype::f16: return backward<f16, float>(p, parallel);
  }
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(chunk_gated_delta_rule_backward_cpu, ChunkGatedDeltaRuleBackwardParams, params.forward.in.q.dtype)
