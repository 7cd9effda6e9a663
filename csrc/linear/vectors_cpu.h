// The product in vectors along the columns: a row of W times a row of x is a vector of sums, added up at the end.
#pragma once

#include "csrc/linear/columns_cpu.h"
#include "csrc/linear/formats_cpu.h"

namespace jet::cpu::JET_CPU_ISA {

template <class Format, class T, bool scaled>
class VectorLinear {
  using Acc = Arithmetic<T>;
  using Vec = Vector<Acc>;
  using Unit = typename Format::Unit;
  using Weight = typename Format::Weight;
  static constexpr int V = Format::vectors;
  static constexpr long kStepUnits = V * Simd<Unit>::lanes;
  static constexpr long kLineColumns = 64 * Format::per_weight / long(sizeof(Weight));  // columns of W in a cache line

 public:
  explicit VectorLinear(const LinearParams& p)
      : p_(p), columns_(p, Format::width), row_units_(columns_.steps() * kStepUnits) {}

  void run(const Parallel& parallel) const {
    const Buffer<Unit> x(p_.N * row_units_);
    run_even_tasks(for_work(parallel, kCopy * double(p_.N) * p_.C), larger(1, parallel.threads), p_.N,
                   [&](long, long n) { pack_row(n, x.get() + n * row_units_); });
    run_blocks(p_, for_work(parallel, double(p_.N) * p_.C * p_.P), [&](long p0) { run_block(p0, x.get()); });
  }

 private:
  void pack_row(long n, Unit* units) const {
    const T* x = static_cast<const T*>(p_.x) + n * p_.x_row;
    for (long g = 0; g < columns_.groups; ++g)
      columns_.for_steps(g, [&](long c, long count, long step) {
        Format::pack(x + c * p_.x_column, p_.x_column, count, units + step * kStepUnits);
      });
  }

  // Tiles of rows of W x rows of x that fill the registers.
  void run_block(long p0, const Unit* x) const {
    if constexpr (kRegisters == 32) {
      if (p_.N == 1) return run_rows<scaled ? 8 : 16, 1>(p0, 0, x);
      if (p_.N == 2) return run_rows<8, 2>(p0, 0, x);
      long n = 0;
      for (; n + 6 <= p_.N; n += 6) run_rows<4, 6>(p0, n, x);
      if (n + 4 <= p_.N) run_rows<4, 4>(p0, n, x), n += 4;
      if (n + 3 <= p_.N) run_rows<4, 3>(p0, n, x), n += 3;
      if (n + 2 <= p_.N) run_rows<4, 2>(p0, n, x), n += 2;
      if (n < p_.N) run_rows<4, 1>(p0, n, x);
    } else {
      long n = 0;
      for (; n + 2 <= p_.N; n += 2) run_rows<4, 2>(p0, n, x);
      if (n < p_.N) run_rows<8, 1>(p0, n, x);
    }
  }

  // R rows of x from n on.
  template <int O, int R>
  void run_rows(long p0, long n, const Unit* x) const {
    alignas(64) Acc sums[R][kBlock];
    for (long o = 0; o < kBlock; o += O) run_tile<O, R>(p0 + o, x + n * row_units_, &sums[0][o]);
    for (int r = 0; r < R; ++r) store_outputs<T>(p_, n + r, p0, sums[r]);
  }

  // sums[r][o]; rows of W after the last are taken to be the last, and nobody reads their sums
  template <int O, int R>
  void run_tile(long p0, const Unit* x, Acc* sums) const {
    const Weight* w[O];
    for (int o = 0; o < O; ++o) w[o] = static_cast<const Weight*>(p_.weight) + row(p0 + o) * p_.weight_row;
    Vec total[O][R] = {};
    for (long g = 0; g < columns_.groups; ++g) {
      Vec acc[O][R];
#pragma GCC unroll 16
      for (int o = 0; o < O; ++o)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[o][r] = Vec{};
      columns_.for_steps(g, [&](long c, long count, long step) __attribute__((always_inline)) {
        // Of a step of one vector the numbers of all O rows of W stay in registers, for each row of x; of a longer one
        // those of one row of W.
        constexpr int together = V == 1 ? O : 1;
#pragma GCC unroll 16
        for (int first = 0; first < O; first += together) {
          Vector<Unit> units[together][V];
#pragma GCC unroll 16
          for (int o = 0; o < together; ++o) {
            const Weight* at = Format::row_at(w[first + o], c);
            if (Format::width >= kLineColumns || c % kLineColumns == 0)
              __builtin_prefetch(at + O * p_.weight_row);  // the next tile
            Format::load(at, count, units[o]);
          }
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
              const Vector<Unit> xs = Simd<Unit>::load(x + r * row_units_ + step * kStepUnits + v * Simd<Unit>::lanes);
#pragma GCC unroll 16
              for (int o = 0; o < together; ++o) acc[first + o][r] = multiply_add(units[o][v], xs, acc[first + o][r]);
            }
        }
      });
#pragma GCC unroll 16
      for (int o = 0; o < O; ++o) {
        const Vec scale = Simd<Acc>::all(scaled ? Acc(p_.scale[row(p0 + o) * p_.G + g]) : Acc(1));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) total[o][r] = scaled ? total[o][r] + scale * acc[o][r] : acc[o][r];
      }
    }
    for (int o = 0; o < O; ++o)
      for (int r = 0; r < R; ++r) sums[r * kBlock + o] = horizontal_sum<Acc>(total[o][r]);
  }

  long row(long p) const { return smaller(p, p_.P - 1); }

  const LinearParams& p_;
  const Columns columns_;
  const long row_units_;
};

}  // namespace jet::cpu::JET_CPU_ISA
