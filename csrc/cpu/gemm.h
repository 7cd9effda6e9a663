// Single-thread GEMM on small matrices that live in L1 or L2, and the register tile it is made of.
//
//   C = alpha A B   or   C += alpha A B        A [M, K]  B [K, N]  C [M, N], C row-major
//
// A and B are addressed by two strides, so a transpose costs nothing for A (its elements are broadcast) and one packing
// pass for B. Fused kernels use `Tile` directly: it holds [rows x vectors] of the product in registers over any number
// of `add` calls, so that several products can be summed, scaled and solved without leaving the register file.
#pragma once

#include "csrc/cpu/simd.h"

namespace jet::cpu::JET_CPU_ISA {

template <int N>
struct Int {
  static constexpr int value = N;
};

// acc [R rows, NV vectors] in registers.
template <class T, int R, int NV>
struct Tile {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  Vec acc[R][NV];

  JET_INLINE void zero() {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[r][v] = Vec{};
  }

  JET_INLINE void load(const T* c, long ldc) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[r][v] = S::load(c + r * ldc + v * S::lanes);
  }

  // acc = factor C
  JET_INLINE void load_scaled(const T* c, long ldc, T factor) {
    const Vec f = S::all(factor);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[r][v] = f * S::load(c + r * ldc + v * S::lanes);
  }

  JET_INLINE void store(T* c, long ldc) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) S::store(c + r * ldc + v * S::lanes, acc[r][v]);
  }

  JET_INLINE void scale(T factor) {
    const Vec f = S::all(factor);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[r][v] *= f;
  }

  // acc(:, j) *= factors[j]
  JET_INLINE void scale_columns(const T* factors) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) acc[r][v] *= S::load(factors + v * S::lanes);
  }

  // dots[j] += sum_r acc(r, j) M(r, j)
  JET_INLINE void dot_columns(const T* m, long ldm, T* dots) const {
#pragma GCC unroll 16
    for (int v = 0; v < NV; ++v) {
      Vec sum = S::load(dots + v * S::lanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum += acc[r][v] * S::load(m + r * ldm + v * S::lanes);
      S::store(dots + v * S::lanes, sum);
    }
  }

  // C += acc
  JET_INLINE void add_to(T* c, long ldc) const {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) {
        T* p = c + r * ldc + v * S::lanes;
        S::store(p, S::load(p) + acc[r][v]);
      }
  }

  // acc += A B   A(r, k) = a[r * row + k * col]   B(k, :) = b[k * ldb]   in numbers or in pairs of bf16
  template <class Unit>
  JET_INLINE void add_product(const Unit* a, long row, long col, const Unit* b, long ldb, long depth) {
    for (long k = 0; k < depth; ++k, a += col, b += ldb) {
      Vector<Unit> bk[NV];
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) bk[v] = Simd<Unit>::load(b + v * S::lanes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vector<Unit> ark = Simd<Unit>::all(a[r * row]);
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[r][v] = multiply_add(ark, bk[v], acc[r][v]);
      }
    }
  }

  // acc += L B, or L^T B, for the lower part of L [R, R]. Row r is made of rows s <= r, or s >= r, of B alone, whatever
  // the others hold.
  template <bool transposed>
  JET_INLINE void add_triangle_product(const T* l, long ldl, const T* b, long ldb) {
#pragma GCC unroll 16
    for (int s = 0; s < R; ++s) {
      Vec bs[NV];
#pragma GCC unroll 16
      for (int v = 0; v < NV; ++v) bs[v] = S::load(b + s * ldb + v * S::lanes);
#pragma GCC unroll 16
      for (int r = transposed ? 0 : s; r < (transposed ? s + 1 : R); ++r) {
        const Vec lrs = S::all(transposed ? l[s * ldl + r] : l[r * ldl + s]);
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[r][v] += lrs * bs[v];
      }
    }
  }

  // acc <- (I - L)^-1 acc for the strictly lower part of L [R, R], L(r, s) = l[r * row + s * col]
  JET_INLINE void solve_lower(const T* l, long row, long col) {
#pragma GCC unroll 16
    for (int r = 1; r < R; ++r)
#pragma GCC unroll 16
      for (int s = 0; s < r; ++s) {
        const Vec lrs = S::all(l[r * row + s * col]);
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[r][v] += lrs * acc[s][v];
      }
  }

  // acc <- (I - L)^-1 acc for the strictly upper part of L [R, R], L(r, s) = l[r * row + s * col]
  JET_INLINE void solve_upper(const T* l, long row, long col) {
#pragma GCC unroll 16
    for (int r = R - 2; r >= 0; --r)
#pragma GCC unroll 16
      for (int s = r + 1; s < R; ++s) {
        const Vec lrs = S::all(l[r * row + s * col]);
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) acc[r][v] += lrs * acc[s][v];
      }
  }
};

// Calls body(Int<R>, first row) for blocks of rows that cover exactly [begin, end).
template <class F>
JET_INLINE void for_row_blocks(long begin, long end, F&& body) {
  long i = begin;
  for (; i + kTileRows <= end; i += kTileRows) body(Int<kTileRows>{}, i);
  if (i + 4 <= end) body(Int<4>{}, i), i += 4;
  if (i + 2 <= end) body(Int<2>{}, i), i += 2;
  if (i < end) body(Int<1>{}, i);
}

// The same from the last rows to the first.
template <class F>
JET_INLINE void for_row_blocks_upwards(long begin, long end, F&& body) {
  long i = end;
  while (i - kTileRows >= begin) body(Int<kTileRows>{}, i -= kTileRows);
  if (i - 4 >= begin) body(Int<4>{}, i -= 4);
  if (i - 2 >= begin) body(Int<2>{}, i -= 2);
  if (i > begin) body(Int<1>{}, begin);
}

// Calls body(Int<number of vectors>) for the narrowest tile that covers `columns` <= stripe columns.
template <class T, class F>
JET_INLINE void with_vectors(long columns, F&& body) {
  const long vectors = (columns + Simd<T>::lanes - 1) / Simd<T>::lanes;
  if constexpr (kTileVectors == 4) {
    if (vectors == 4) return body(Int<4>{});
    if (vectors == 3) return body(Int<3>{});
  }
  if (vectors == 2) return body(Int<2>{});
  body(Int<1>{});
}

template <class T>
struct Matrix {
  const T* data;
  long row, col;  // element (i, j) is data[i * row + j * col]

  Matrix t() const { return {data, col, row}; }
};

// Which work a triangle saves. The skipped part is never read (A) or never written above the diagonal's tile (C).
enum class Skip {
  nothing,
  upper_c,  // only C(i, j) with j <= i is wanted
  upper_a,  // A(i, k) = 0 for k > i
  lower_a,  // A(i, k) = 0 for k < i
};

// dst(j, i) = src(i, j), both row-major and padded to whole blocks of lanes x lanes.
template <class T>
inline void transpose(const T* src, long lds, long rows, long cols, T* dst, long ldd) {
  using S = Simd<T>;
  constexpr int L = S::lanes;
  for (long i = 0; i < rows; i += L)
    for (long j = 0; j < cols; j += L) {
      typename S::Vec x[L];
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) x[r] = S::load(src + (i + r) * lds + j);
      transpose_in_registers(x);
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) S::store(dst + (j + r) * ldd + i, x[r]);
    }
}

constexpr long kPackDepth = 256;  // rows of B packed at a time: 256 x 64 fp32 = 64 KiB of stack

// panel [depth, NV * lanes] = B[k0 : k0 + depth, j0 : j0 + columns], zero-padded on the right
template <class T>
inline void pack_panel(Matrix<T> b, long k0, long j0, long depth, long columns, T* panel, long ldp) {
  using S = Simd<T>;
  const T* src = b.data + k0 * b.row + j0 * b.col;
  if (b.row == 1 && depth % S::lanes == 0 && columns % S::lanes == 0) {
    transpose(src, b.col, columns, depth, panel, ldp);
    return;
  }
  for (long k = 0; k < depth; ++k)
    for (long j = 0; j < ldp; ++j) panel[k * ldp + j] = j < columns ? src[k * b.row + j * b.col] : T(0);
}

// C [M, N] = alpha A B, or += when accumulate. N and every stride are arbitrary; C has unit column stride.
template <class T>
inline void gemm(long M, long N, long K, T alpha, Matrix<T> A, Matrix<T> B, bool accumulate, T* C, long ldc,
                 Skip skip = Skip::nothing) {
  using S = Simd<T>;
  alignas(64) T panel[kPackDepth * S::stripe];
  for (long j0 = 0; j0 < N; j0 += S::stripe) {
    const long columns = N - j0 < S::stripe ? N - j0 : S::stripe;
    const bool direct = B.col == 1 && columns % S::lanes == 0;
    const long step = direct ? (K > 0 ? K : 1) : kPackDepth;
    long k0 = 0;
    do {  // once even for K = 0, which clears C
      const long depth = K - k0 < step ? K - k0 : step;
      const T* b = B.data + k0 * B.row + j0;
      long ldb = B.row;
      if (!direct) {
        pack_panel(B, k0, j0, depth, columns, panel, S::stripe);
        b = panel, ldb = S::stripe;
      }
      const bool add = accumulate || k0 > 0;
      for_row_blocks(0, M, [&](auto rows, long i) {
        constexpr int R = decltype(rows)::value;
        const long wanted = skip == Skip::upper_c && i + R - j0 < columns ? i + R - j0 : columns;
        if (wanted <= 0) return;
        long first = 0, last = depth;
        if (skip == Skip::upper_a && i + R - k0 < last) last = i + R - k0;
        if (skip == Skip::lower_a && i - k0 > first) first = i - k0;
        if (last < first) last = first = 0;
        with_vectors<T>(wanted, [&](auto vectors) {
          constexpr int NV = decltype(vectors)::value;
          Tile<T, R, NV> tile;
          tile.zero();
          tile.add_product(A.data + i * A.row + (k0 + first) * A.col, A.row, A.col, b + first * ldb, ldb, last - first);
          tile.scale(alpha);
          T* c = C + i * ldc + j0;
          if (NV * S::lanes <= columns) {
            if (add)
              tile.add_to(c, ldc);
            else
              tile.store(c, ldc);
          } else {
            alignas(64) T edge[R * NV * S::lanes];
            tile.store(edge, NV * S::lanes);
            for (int r = 0; r < R; ++r)
              for (long j = 0; j < columns; ++j)
                c[r * ldc + j] = (add ? c[r * ldc + j] : T(0)) + edge[r * NV * S::lanes + j];
          }
        });
      });
      k0 += step;
    } while (k0 < K);
  }
}

}  // namespace jet::cpu::JET_CPU_ISA
