// Forward of the chunked gated delta rule on a CPU, on states of its own or on a pool. One work item is a sequence and
// a few value heads; it walks over the chunks with their states in L2. Per chunk the V columns are processed in stripes
// one register tile wide, whose part of the state, V and U stays in L1, and each stage is one pass over the tile: R is
// never stored, T is never formed. With AMX, 16-bit inputs have the products with the state and with U in its tiles
// (tiles_cpu.h).
#include <type_traits>
#include <vector>

#include "csrc/cpu/isa.h"
#include "csrc/gated_delta_rule/chunk/prefill_gated_delta_rule.h"
#include "csrc/gated_delta_rule/chunk/stages_cpu.h"
#include "csrc/gated_delta_rule/chunk/tiles_cpu.h"

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

// Where there are no tiles.
struct NoTiles {
  struct Registers {};
  static bool take(const GatedDeltaRuleInputs&) { return false; }
  static bool take(long, long) { return false; }
  void carve(Carver&, long) {}
  template <class T>
  void load(const Chunk<T>&) {}
  template <class T>
  long run(const Chunk<T>&, T*, T*, T*, RowsAhead&) const {
    return 0;
  }
};

#if defined(__AVX512F__)
inline bool amx_is_active() { return amx_bf16_is_active(); }
template <class In>
using TilesFor = std::conditional_t<sizeof(In) == 2, ChunkTiles, NoTiles>;
#else
inline bool amx_is_active() { return false; }
template <class In>
using TilesFor = NoTiles;
#endif

template <class In, class T>
struct Scratchpad {
  Chunk<T> chunk;
  TilesFor<In> tiles;
  T *states, *u, *o;  // stripes [heads][V / W][K, W], one stripe [C, W] each

  void carve(Carver& from, long K, long stripes, bool in_tiles) {
    constexpr long W = Simd<T>::stripe;
    chunk.carve(from, K);
    if (in_tiles) tiles.carve(from, K);
    states = from.take<T>(stripes * K * W), u = from.take<T>(C * W), o = from.take<T>(C * W);
  }
};

// Where the states of a call come from and go to: columns [v, v + columns) of head h, into a stripe and back. Asked for
// at both ends of a sequence and at marks alone, so that one code of the chunks serves all.
template <class T>
struct States {
  virtual bool has_row(long) const { return true; }  // else the outputs of sequence n are zeros
  virtual void load(long n, long h, long v, long columns, T* stripe) const = 0;
  virtual void store(long n, long h, long v, long columns, const T* stripe) const = 0;
  // After so many tokens of sequence n, which are whole chunks or all of it.
  virtual long mark(long, long) const { return -1; }
  virtual void store_mark(long, long, long, long, const T*) const {}

 protected:
  ~States() = default;
};

template <class T>
struct OwnStates final : States<T> {
  const ChunkGatedDeltaRuleParams& p;

  explicit OwnStates(const ChunkGatedDeltaRuleParams& p) : p(p) {}
  void load(long n, long h, long v, long columns, T* stripe) const override {
    load_state(at<T>(p.initial_state, n, h), p.initial_state.strides, p.in.K, v, columns, stripe);
  }
  void store(long n, long h, long v, long columns, const T* stripe) const override {
    const StateStrides dense = contiguous_state(p.in);
    store_state(stripe, dense, p.in.K, v, columns, at(static_cast<T*>(p.final_state), dense, n, h));
  }
};

template <class T, class St>
class PooledStates final : public States<T> {
 public:
  explicit PooledStates(const PrefillGatedDeltaRuleParams& p) : p_(p.states), K_(p.forward.in.K) {
    if (p_.M == 0) return;
    long chunks = 0;
    for (long n = 0; n < p.forward.N; ++n) {
      first_chunk_.push_back(chunks);
      chunks += (sequence(p.forward, n).length + C - 1) / C;
    }
    marks_.assign(chunks, -1);
    for (long m = 0, row; m < p_.M; ++m) {
      if ((row = index_at(p_.mark_rows, m)) < 0) continue;
      const long token = index_at(p_.mark_tokens, m);  // which the checks have found to be a mark
      long n = 0;
      while (sequence(p.forward, n).begin + sequence(p.forward, n).length < token) ++n;
      marks_[first_chunk_[n] + (token - sequence(p.forward, n).begin - 1) / C] = row;
    }
  }

  bool has_row(long n) const override { return row_of(p_.pool, n) >= 0; }
  void load(long n, long h, long v, long columns, T* stripe) const override {
    const bool is_there = p_.has_initial_state == nullptr || p_.has_initial_state[n];
    load_state(is_there ? state(row_of(p_.pool, n), h) : nullptr, p_.pool.strides, K_, v, columns, stripe);
  }
  void store(long n, long h, long v, long columns, const T* stripe) const override {
    store_mark(row_of(p_.pool, n), h, v, columns, stripe);
  }
  long mark(long n, long tokens) const override {
    return marks_.empty() ? -1 : marks_[first_chunk_[n] + (tokens - 1) / C];
  }
  void store_mark(long row, long h, long v, long columns, const T* stripe) const override {
    store_state(stripe, p_.pool.strides, K_, v, columns, state(row, h));
  }

 private:
  St* state(long row, long h) const { return at(static_cast<St*>(p_.pool.data), p_.pool.strides, row, h); }

  const PrefillStates& p_;
  const long K_;
  std::vector<long> first_chunk_, marks_;  // [N]; [chunks] the row that the state behind a chunk goes to, or -1
};

// What a worker does at a time: columns [v0, v1) of heads [h0, h1) of one sequence.
struct Item {
  long n, h0, h1, v0, v1;
};

template <class In, class T>
class Forward {
  static constexpr long W = Simd<T>::stripe;

 public:
  Forward(const ChunkGatedDeltaRuleParams& p, const States<T>& states, const Item& item,
          const Scratchpad<In, T>& scratchpad, bool in_tiles)
      : p_(p),
        in_(p.in),
        states_(states),
        item_(item),
        seq_(sequence(p, item.n)),
        pad_(scratchpad),
        in_tiles_(in_tiles) {}

  void run() {
    if (!states_.has_row(item_.n)) return write_zeros();
    for_stripes([&](long h, long v, T* state) { states_.load(item_.n, h, v, columns(v), state); });
    for (long t = 0; t < seq_.length; t += C) {
      for (long h = item_.h0; h < item_.h1; ++h) chunk(t, h);
      const long row = states_.mark(item_.n, t + tokens(t));
      if (row >= 0) for_stripes([&](long h, long v, T* state) { states_.store_mark(row, h, v, columns(v), state); });
    }
    for_stripes([&](long h, long v, T* state) { states_.store(item_.n, h, v, columns(v), state); });
  }

 private:
  long columns(long v) const { return smaller(W, in_.V - v); }
  long tokens(long t) const { return smaller(C, seq_.length - t); }

  In* output(long t, long h, long v) const {
    return static_cast<In*>(p_.o) + ((seq_.b * in_.T + seq_.begin + t) * in_.H + h) * in_.V + v;
  }

  void write_zeros() const {
    for (long t = 0; t < seq_.length; ++t)
      for (long h = item_.h0; h < item_.h1; ++h)
        __builtin_memset(output(t, h, item_.v0), 0, (item_.v1 - item_.v0) * sizeof(In));
  }

  template <class F>
  void for_stripes(const F& f) const {
    T* state = pad_.states;
    for (long h = item_.h0; h < item_.h1; ++h)
      for (long v = item_.v0; v < item_.v1; v += W, state += in_.K * W) f(h, v, state);
  }

  void chunk(long t, long h) {
    Chunk<T>& c = pad_.chunk;
    const long begin = seq_.begin + t;
    prepare<In>(in_, seq_.b, begin, tokens(t), h, c);
    fold_factors(T(in_.scale), c);
    const long whole_stripes = (item_.v1 - item_.v0) / W;
    const bool in_tiles = in_tiles_ && TilesFor<In>::take(c.L, whole_stripes);
    if (in_tiles) pad_.tiles.load(c);
    const bool last = h + 1 == item_.h1;
    const long next_h = last ? item_.h0 : h + 1, next_t = last ? t + C : t, next = tokens(next_t);
    const long next_hk = next_h / (in_.H / in_.Hk), next_begin = seq_.begin + next_t;
    const In *next_q = at<In>(in_.q, seq_.b, next_begin, next_hk), *next_k = at<In>(in_.k, seq_.b, next_begin, next_hk);
    const TokenStrides o_strides{0, in_.H * in_.V, in_.V, 1};
    if (!in_tiles) {
      prefetch_rows(next_q, in_.q.strides, next, in_.K);
      prefetch_rows(next_k, in_.k.strides, next, in_.K);
    }
    T* state = pad_.states + (h - item_.h0) * round_up(item_.v1 - item_.v0, W) * in_.K;
    for (long v = item_.v0; v < item_.v1; v += W, state += in_.K * W) {
      const In* next_v = at<In>(in_.v, seq_.b, next_begin, next_h) + v * in_.v.strides.d;
      const In* values = at<In>(in_.v, seq_.b, begin, h) + v * in_.v.strides.d;
      In* o = output(t, h, v);
      const auto load_u = [&] {  // diag(beta) V
        for (long i = 0; i < c.L; ++i) {
          T* row = pad_.u + i * W;
          const Vector<T> beta = Simd<T>::all(c.beta[i]);
          load_row(values + i * in_.v.strides.t, in_.v.strides.d, columns(v), W, row);
          for (long j = 0; j < W; j += Simd<T>::lanes) Simd<T>::store(row + j, Simd<T>::load(row + j) * beta);
        }
      };
      load_u();
      const bool is_whole = in_tiles && columns(v) == W;
      RowsAhead ahead;
      if (is_whole) {
        const long stripe = (v - item_.v0) / W;
        const long first = next * stripe / whole_stripes, rows = next * (stripe + 1) / whole_stripes;
        ahead.add(o, o_strides, 0, c.L, columns(v), 4);
        ahead.add(next_v, in_.v.strides, 0, next, columns(v), 2);
        ahead.add(next_q, in_.q.strides, first, rows - first, in_.K, 1);
        ahead.add(next_k, in_.k.strides, first, rows - first, in_.K, 1);
      } else {
        prefetch_rows(next_v, in_.v.strides, next, columns(v));
      }
      const auto store_o = [&](long first, long last) {
        for (long i = first; i < last; ++i) store_row(pad_.o + i * W, columns(v), o + i * o_strides.t);
      };
      const long done = is_whole ? pad_.tiles.run(c, state, pad_.u, pad_.o, ahead) : 0;
      store_o(0, done);
      if (done == c.L) continue;
      if (is_whole) load_u();
      with_vectors<T>(columns(v),
                      [&](auto vectors) { chunk_stripe<T, decltype(vectors)::value>(c, state, pad_.u, pad_.o); });
      store_o(done, c.L);
    }
  }

  const ChunkGatedDeltaRuleParams& p_;
  const GatedDeltaRuleInputs& in_;
  const States<T>& states_;
  const Item item_;
  const Sequence seq_;
  Scratchpad<In, T> pad_;
  const bool in_tiles_;
};

// How a call is cut into items.
struct Cut {
  long groups, heads;    // groups of so many heads
  long slices, columns;  // slices of so many columns
};

// Neighbouring heads in a group read and write memory that lies together, so that a page of q, k, v and o is looked up
// for all of them. As many as have states of 256 KB, which leaves room in any L2, and only as long as every worker gets
// two items, one of which another worker takes over from one that is slow.
template <class T>
Cut cut(const ChunkGatedDeltaRuleParams& p, long threads) {
  constexpr long W = Simd<T>::stripe, kStates = 256 << 10, kItems = 2;
  const long H = p.in.H, stripes = round_up(p.in.V, W) / W, items = p.N * H;
  // Fewer heads than threads: slices of V, each repeating the part of a chunk that does not depend on V.
  const long slices = smaller(stripes, items < threads ? (threads + items - 1) / items : 1);
  const long columns = (stripes + slices - 1) / slices * W;
  const long most = larger(1, smaller(kStates / (p.in.K * columns * long(sizeof(T))), items / (kItems * threads)));
  const long groups = (H + most - 1) / most;
  return {groups, (H + groups - 1) / groups, slices, columns};
}

template <class In, class T>
void forward(const ChunkGatedDeltaRuleParams& p, const States<T>& states, const Parallel& caller) {
  const GatedDeltaRuleInputs& in = p.in;
  const Parallel parallel = for_work(caller, chunk_work(p));
  if (p.N * in.H == 0) return;
  const Cut by = cut<T>(p, parallel.threads);
  const long items = p.N * by.groups * by.slices, workers = smaller(parallel.threads, items);
  const long stripes = by.heads * by.columns / Simd<T>::stripe;
  const bool in_tiles = TilesFor<In>::take(in) && amx_is_active();
  Carver count(nullptr);
  Scratchpad<In, T>().carve(count, in.K, stripes, in_tiles);
  const Scratch scratch(workers, count.used());
  run_tasks(parallel, workers, items, [&](long worker, long i) {
    const long h0 = i / by.slices / p.N * by.heads, v0 = i % by.slices * by.columns;
    const Item item{i / by.slices % p.N, h0, smaller(in.H, h0 + by.heads), v0, smaller(in.V, v0 + by.columns)};
    Carver from(scratch.of(worker));
    Scratchpad<In, T> pad;
    pad.carve(from, in.K, stripes, in_tiles);
    const auto work = [&] { Forward<In, T>(p, states, item, pad, in_tiles).run(); };
    if (in_tiles) {
      [[maybe_unused]] const typename TilesFor<In>::Registers registers;
      work();
    } else {
      work();
    }
  });
}

void forward_in_fp32(const ChunkGatedDeltaRuleParams& p, const States<float>& states, const Parallel& parallel) {
  switch (p.in.q.dtype) {
    case Dtype::f32: return forward<float, float>(p, states, parallel);
    case Dtype::bf16: return forward<bf16, float>(p, states, parallel);
    default: return forward<f16, float>(p, states, parallel);
  }
}

}  // namespace

void chunk_gated_delta_rule_cpu(const ChunkGatedDeltaRuleParams& p, const Parallel& parallel) {
  if (p.in.q.dtype == Dtype::f64) JET_CPU_FP64((forward<double, double>(p, OwnStates<double>(p), parallel)));
  forward_in_fp32(p, OwnStates<float>(p), parallel);
}

void prefill_gated_delta_rule_cpu(const PrefillGatedDeltaRuleParams& p, const Parallel& parallel) {
  if (p.states.pool.dtype == Dtype::f64)
    JET_CPU_FP64((forward<double, double>(p.forward, PooledStates<double, double>(p), parallel)));
  with_fp32_pool(p.states.pool.dtype, [&](auto state) {
    forward_in_fp32(p.forward, PooledStates<float, typename decltype(state)::Type>(p), parallel);
  });
}

}  // namespace jet::cpu::JET_CPU_ISA

JET_CPU_LAUNCHER(chunk_gated_delta_rule_cpu, ChunkGatedDeltaRuleParams, params.in.q.dtype)
JET_CPU_LAUNCHER(prefill_gated_delta_rule_cpu, PrefillGatedDeltaRuleParams, params.forward.in.q.dtype)
