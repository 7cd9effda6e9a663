// What a block of keys adds to the sums of a group of queries, in any dtype, and what the two ways to compute it share.
#pragma once

#include <algorithm>
#include <limits>

#include "csrc/cpu/elements.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/tasks.h"

namespace jet::cpu::JET_CPU_ISA {

// What a task leaves of a piece, for each query of the group.
template <class Acc>
struct AttentionSums {
  Acc *o, *most, *sum;  // sum of values [group, width] in the order of load_two; largest score; sum of exponentials
};

constexpr long kBlock = 64;            // keys whose scores are held at a time; 16 KiB of bf16 keys of 128
constexpr long kPrefetchBytes = 8192;  // ahead, of keys and of values; of 2 to 16 KiB the best on two Xeon cores

// What one step of a score multiplies: numbers, or pairs of bf16 where the CPU has the instruction.
template <class T>
struct NumberScores {
  using Element = T;
  using Query = Arithmetic<T>;
  static constexpr int step = kLanes<T>;
  static JET_INLINE Vector<Query> load_query(const Query* q) { return load(q); }
  static JET_INLINE Vector<Query> load_key(const T* key) { return load(key); }
};

#if defined(__AVX512F__)
struct PairScores {
  using Element = bf16;
  using Query = bf16;
  static constexpr int step = 2 * kLanes<bf16>;
  static JET_INLINE Words load_key(const bf16* key) { return (Words)_mm512_loadu_si512(key); }
  static JET_INLINE Words load_query(const bf16* q) { return load_key(q); }
};
#endif

// Two vectors of values. Those of bf16 are the even and the odd columns, which takes one load and two operations;
// `in_order` undoes it.
template <class T>
JET_INLINE void load_two(const T* p, Vector<Arithmetic<T>> (&x)[2]) {
  x[0] = load(p), x[1] = load(p + kLanes<T>);
}
JET_INLINE void load_two(const bf16* p, Floats (&x)[2]) {
  typedef uint32_t Unaligned __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
  const Words both = *reinterpret_cast<const Unaligned*>(p);
  x[0] = (Floats)(both << 16), x[1] = (Floats)(both & 0xffff0000u);
}

template <class T>
JET_INLINE void in_order(const Vector<Arithmetic<T>> (&x)[2], Vector<Arithmetic<T>> (&y)[2]) {
  y[0] = x[0], y[1] = x[1];
}
template <>
JET_INLINE void in_order<bf16>(const Floats (&x)[2], Floats (&y)[2]) {
  constexpr int L = kLanes<bf16>;
  Ints low{}, high{};
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) low[i] = i / 2 + i % 2 * L, high[i] = low[i] + L / 2;
  y[0] = __builtin_shuffle(x[0], x[1], low), y[1] = __builtin_shuffle(x[0], x[1], high);
}

// Lane i of the result is the sum of x[i]. Lanes of which bit n is set go to the upper half of the 2n vectors: one
// blend, one shuffle and one addition for two of them.
template <class V, int vectors>
JET_INLINE V sums_of(const V (&x)[vectors]) {
  if constexpr (vectors == 1) {
    return x[0];
  } else {
    constexpr int n = vectors / 2, L = sizeof(V) / sizeof(x[0][0]);
    typedef decltype(V{} < V{}) Index;
    Index own{}, other{};
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      const int upper = (i & n) != 0 ? L : 0;
      own[i] = i + upper, other[i] = (i ^ n) + upper;
    }
    V y[n];
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
      y[i] = __builtin_shuffle(x[i], x[i + n], own) + __builtin_shuffle(x[i], x[i + n], other);
    return sums_of(y);
  }
}

template <class A>
JET_INLINE A largest(Vector<A> x) {
  A most = x[0];
#pragma GCC unroll 16
  for (int i = 1; i < Simd<A>::lanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

template <class A>
JET_INLINE A exponential_of(A x) {
  return exponential(Simd<A>::all(x))[0];
}

template <class Scores>
class VectorAttention {
 public:
  using Element = typename Scores::Element;
  using Query = typename Scores::Query;
  static constexpr bool kWholeBlocks = false;

 private:
  using T = Element;
  using Acc = Arithmetic<T>;
  using S = Simd<Acc>;
  using Vec = Vector<Acc>;
  static constexpr int L = kLanes<T>;
  static constexpr Acc kNothing = -std::numeric_limits<Acc>::infinity();

 public:
  // Memory of a worker.
  struct Room {
    const Query* q;  // [group, width]
    Acc* scores;     // [group, kBlock], then the exponentials
    Acc* sums;       // [group, L] of exponentials, lane by lane
    Acc* factors;    // [group] by which a block shrinks what came before it
  };

  VectorAttention(long group, long width, Acc scale) : group_(group), width_(width), scale_(scale) {}

  void carve(Carver& carver, Room& r) const {
    r.scores = carver.take<Acc>(group_ * kBlock);
    r.sums = carver.take<Acc>(group_ * L);
    r.factors = carver.take<Acc>(group_);
  }

  // The registers that a task sets up: none.
  int registers() const { return 0; }

  // q [group, width] stays where it is until `end`.
  void begin(Room& room, const Query* q, const AttentionSums<Acc>& result) const {
    room.q = q;
    std::fill_n(result.o, group_ * width_, Acc(0));
    std::fill_n(result.most, group_, kNothing);
    std::fill_n(room.sums, group_ * L, Acc(0));
  }

  void add(const Room& room, const T* keys, long key_row, const T* values, long value_row, long count,
           const AttentionSums<Acc>& result) const {
    find_scores(room, keys, key_row, count);
    for (long i = 0; i < group_; ++i)
      result.most[i] = soften(room.scores + i * kBlock, count, result.most[i], room.sums + i * L, room.factors[i]);
    for_row_blocks(0, group_, [&](auto rows, long i) {
      for (long c = 0; c < width_;) {
        const bool wide = width_ - c >= kTileVectors * L;
        if (wide)
          add_values<decltype(rows)::value, kTileVectors>(room, i, c, values, value_row, count, result.o);
        else
          add_values<decltype(rows)::value, 2>(room, i, c, values, value_row, count, result.o);
        c += (wide ? kTileVectors : 2) * L;
      }
    });
  }

  void end(const Room& room, const AttentionSums<Acc>& result) const {
    for (long i = 0; i < group_; ++i) result.sum[i] = horizontal_sum<Acc>(load(room.sums + i * L));
  }

 private:
  // The first queries of a group ask for keys of later blocks as they go.
  void find_scores(const Room& room, const T* keys, long key_row, long count) const {
    long i = 0;
    const auto queries = [&](auto most) {
      constexpr int Q = decltype(most)::value;
      if constexpr (Q <= L)
        for (; i + Q <= group_; i += Q) {
          const Query* q = room.q + i * width_;
          Acc* scores = room.scores + i * kBlock;
          for (long j = 0; j < count; j += L / Q)
            i == 0 ? find_scores<Q, true>(q, keys, key_row, j, count, scores + j)
                   : find_scores<Q, false>(q, keys, key_row, j, count, scores + j);
        }
    };
    queries(Int<4>()), queries(Int<2>()), queries(Int<1>());
  }

  // scores[a * kBlock + b] = <q_a, key_{j+b}> of Q queries and L / Q keys. Keys past the last are the last.
  template <int Q, bool prefetch>
  __attribute__((noinline)) void find_scores(const Query* q, const T* keys, long key_row, long j, long count,
                                             Acc* scores) const {
    constexpr int K = L / Q;
    using Units = decltype(Scores::load_key(keys));
    const T* key[K];
    Vec dots[L];
#pragma GCC unroll 16
    for (int b = 0; b < K; ++b) key[b] = keys + smaller(j + b, count - 1) * key_row;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) dots[i] = Vec{};
    for (long c = 0; c < width_; c += Scores::step) {
      Units some[Q];
#pragma GCC unroll 4
      for (int a = 0; a < Q; ++a) some[a] = Scores::load_query(q + a * width_ + c);
#pragma GCC unroll 16
      for (int b = 0; b < K; ++b) {
        if constexpr (prefetch) __builtin_prefetch(reinterpret_cast<const char*>(key[b] + c) + kPrefetchBytes);
        const Units units = Scores::load_key(key[b] + c);
#pragma GCC unroll 4
        for (int a = 0; a < Q; ++a) dots[a * K + b] = multiply_add(units, some[a], dots[a * K + b]);
      }
    }
    alignas(64) Acc sums[L];
    store(sums, sums_of(dots));
#pragma GCC unroll 4
    for (int a = 0; a < Q; ++a) __builtin_memcpy(scores + a * kBlock, sums + a * K, K * sizeof(Acc));
  }

  // Scores become exponentials of what they are above the largest so far, which it returns; `factor` is what earlier
  // exponentials shrink by. Before a score above -inf there is nothing to compare with, and 0 stands in.
  Acc soften(Acc* scores, long count, Acc most, Acc* sums, Acc& factor) const {
    const long padded = round_up(count, L);
    Vec lane, best = S::all(most);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) lane[i] = i;
    for (long j = 0; j < padded; j += L) {
      const Vec x = lane < Acc(count - j) ? load(scores + j) * scale_ : S::all(kNothing);
      best = x > best ? x : best;
      store(scores + j, x);
    }
    const Acc now = largest<Acc>(best), reference = now == kNothing ? Acc(0) : now;
    factor = exponential_of(most - reference);
    Vec sum = load(sums) * factor;
    for (long j = 0; j < padded; j += L) {
      const Vec e = exponential(load(scores + j) - reference);
      sum += e;
      store(scores + j, e);
    }
    store(sums, sum);
    return now;
  }

  // o[i + r, c ..] = factor o + sum over j of e_j values[j, c ..], r < R
  template <int R, int NV>
  void add_values(const Room& room, long i, long c, const T* values, long value_row, long count, Acc* o) const {
    Vec acc[R][NV];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = load(o + (i + r) * width_ + c + v * L) * room.factors[i + r];
    const Acc* e = room.scores + i * kBlock;
    const T* value = values + c;
    for (long j = 0; j < count; ++j, ++e, value += value_row) {
      Vec x[NV / 2][2];
#pragma GCC unroll 2
      for (int v = 0; v < NV / 2; ++v) {
        if (i == 0) __builtin_prefetch(reinterpret_cast<const char*>(value + v * 2 * L) + kPrefetchBytes);
        load_two(value + v * 2 * L, x[v]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec weight = S::all(e[r * kBlock]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) acc[r][v] = multiply_add(weight, x[v / 2][v % 2], acc[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(o + (i + r) * width_ + c + v * L, acc[r][v]);
  }

  long group_, width_;
  Acc scale_;
};

}  // namespace jet::cpu::JET_CPU_ISA
