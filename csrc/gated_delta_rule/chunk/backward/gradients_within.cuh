// The products of `gradients` within a chunk (gradients.cuh): W and what follows from it, dP and dM as operands.
#pragma once

#include "csrc/gated_delta_rule/chunk/backward/finite_operand.cuh"
#include "csrc/gated_delta_rule/chunk/backward/gradients_shared.cuh"
#include "csrc/gated_delta_rule/chunk/prepare.cuh"
#include "csrc/hopper/mma.h"

namespace jet::hopper {

// No instruction: what follows from the thread's number behind it is computed anew. Kept from one use to the next, it
// would fill the registers.
__device__ inline int opaque(int thread) {
  unsigned any = thread;
  asm volatile("" : "+r"(any));
  return static_cast<int>(any % kWarpgroup);
}

// Byte offsets in a tile of rows: of the pairs of columns that an accumulator's registers r, r + 1 hold, and of the
// rows that stmatrix writes for 16 columns. What differs between registers is a constant, but for one xor: an address
// each would fill the registers.
template <class Tile>
struct AccumulatorPlace {
  static constexpr int units = Tile::row_bytes / 16;
  int first;
  __device__ explicit constexpr AccumulatorPlace(int thread)
      : first(Tile::offset(accumulator_row(thread, 0), accumulator_column(thread, 0))) {}
  __device__ constexpr int at(int r) const {
    return r / 4 / units * Tile::panel_bytes + (first ^ r / 4 % units * 16) + r / 2 % 2 * 8 * Tile::row_bytes;
  }
};
template <class Tile>
struct StmatrixPlace {
  static constexpr int units = Tile::row_bytes / 16;
  int first;
  __device__ explicit constexpr StmatrixPlace(int thread)
      : first(Tile::offset(stmatrix_row(thread), stmatrix_column(thread))) {}
  __device__ constexpr int at(int step) const {
    return 2 * step / units * Tile::panel_bytes + (first ^ 2 * step % units * 16);
  }
};

namespace proof {

template <class Tile>
constexpr bool places_are_offsets() {
  for (int t = 0; t < kWarpgroup; ++t) {
    const AccumulatorPlace<Tile> pairs(t);
    const StmatrixPlace<Tile> rows(t);
    for (int r = 0; r < Tile::k / 2; ++r)
      if (pairs.at(r / 2 * 2) + r % 2 * 2 != Tile::offset(accumulator_row(t, r), accumulator_column(t, r)))
        return false;
    for (int step = 0; step < Tile::k / kStep; ++step)
      if (rows.at(step) != Tile::offset(stmatrix_row(t), step * kStep + stmatrix_column(t))) return false;
  }
  return true;
}
static_assert(places_are_offsets<OperandTile<uint16_t, Swizzle::b128, Major::k, C, 128>>());
static_assert(places_are_offsets<OperandTile<uint16_t, Swizzle::b64, Major::k, C, 96>>());

}  // namespace proof

constexpr int kBothGroups = 3;  // named barrier
__device__ inline void sync_consumers() { named_barrier_sync(kBothGroups, 2 * kWarpgroup); }

// What a consumer thread knows of a head: its two rows of every accumulator.
template <class Config>
struct GradientThread {
  GradientShared<Config>& shared;
  bool l2norm;
  float scale;
  int thread, count;

  __device__ int row(int e) const { return accumulator_row(thread, 2 * e); }
  __device__ float gate(Gate gate, int i) const { return shared.vectors[int{kVectors} + int{gate}][i]; }
  __device__ SplitSum c(int i) const { return {gate(kSumCoarse, i), gate(kSumFine, i)}; }
  __device__ float beta(int i) const { return gate(kBeta, i); }
  __device__ float of_key(int i) const { return l2norm ? shared.vectors[kInverseK][i] : 1; }
  __device__ float of_query(int i) const { return l2norm ? shared.vectors[kInverseQ][i] : 1; }
  // Of row(e): what makes rows in memory those of Q or K.
  template <bool query>
  __device__ float of_row(int e) const {
    return query ? of_query(row(e)) : of_key(row(e));
  }
  // Of columns j and j + 1.
  __device__ float2 pair(Gate gate, int j) const {
    return *reinterpret_cast<const float2*>(&shared.vectors[int{kVectors} + int{gate}][j]);
  }
  __device__ float2 of_keys(int j) const {
    return l2norm ? *reinterpret_cast<const float2*>(&shared.vectors[kInverseK][j]) : make_float2(1, 1);
  }
};

// d [C, N] += A B^T of 64 value columns.
template <class Mma, class A, class B, class Accumulator>
__device__ void multiply_values(Accumulator& d, const A& a, const B& b) {
#pragma unroll
  for (int step = 0; step < kRows / Mma::K; ++step) Mma::ss(d, a.at(0, step * Mma::K), b.at(0, step * Mma::K), true);
}

template <int n>
__device__ void clear(float (&x)[n]) {
#pragma unroll
  for (int r = 0; r < n; ++r) x[r] = 0;
}

// d = A B^T over the key columns of rows in shared memory   [C, C]; in flight on return.
template <class Config>
__device__ void multiply_rows(typename Config::Tokens& d, const char* a, const char* b) {
  using Mma = typename Config::MmaSquare;
  const typename Config::RowsOperand of_a(a), of_b(b);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Config::K / Mma::K; ++step)
    Mma::ss(d, of_a.at(0, step * Mma::K), of_b.at(0, step * Mma::K), step > 0);
  wgmma_commit_group();
}

// <row, x> over the key columns of a part, of both rows of a thread; in all four threads of a row.
template <class Config>
__device__ float2 dots_with_rows(const char* rows, const typename Config::Keys& x, int part, int thread) {
  float sums[2] = {};
  const AccumulatorPlace<typename Config::Rows> place(opaque(thread));
  rows += Config::part_bytes * part;
#pragma unroll
  for (int r = 0; r < Config::MmaState::registers; r += 2) {
    const uint32_t both = *reinterpret_cast<const uint32_t*>(rows + place.at(r));
    const float2 value = unpack<typename Config::Element>(both);
    sums[r / 2 % 2] += value.x * x[r], sums[r / 2 % 2] += value.y * x[r + 1];
  }
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2)
#pragma unroll
    for (float& sum : sums) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  return {sums[0], sums[1]};
}

// A thread's share of sums over the key columns: those of a part to those of the parts before. Nobody reads those of
// the head before any more: its vectors have made room for this one's.
template <class Config>
__device__ void put_row_sums(const GradientThread<Config>& me, RowSum which, float first, float second, int part) {
  if (me.thread % 4 != 0) return;
  float* const sums = me.shared.row_sums[which];
  sums[me.row(0)] = part > 0 ? sums[me.row(0)] + first : first;
  sums[me.row(1)] = part > 0 ? sums[me.row(1)] + second : second;
}

// Rows of x times a factor each.
template <int n>
__device__ void scale_rows(float (&x)[n], const float (&factor)[2]) {
#pragma unroll
  for (int r = 0; r < n; ++r) x[r] *= factor[r / 2 % 2];
}

// body(r, i, j) for the pairs of elements (i, j), (i, j + 1) of registers r, r + 1 of an accumulator [C, C].
template <class Config, class Body>
__device__ void for_each_pair(const GradientThread<Config>& me, const Body& body) {
  const int thread = opaque(me.thread);
#pragma unroll
  for (int r = 0; r < Config::MmaSquare::registers; r += 2) {
    if (r % 8 == 0) compiler_fence();  // loads of later columns would fill the registers
    body(r, accumulator_row(thread, r), accumulator_column(thread, r));
  }
}

// The sums of W [C, C] in shared memory, of the query's and the key's part, over i >= t, of each column: what passes t,
// and dbeta's.
template <class Config>
__device__ void sum_passing(GradientShared<Config>& shared, int thread) {
  const int column = thread % C, block = thread / C;
  float sum = 0;
#pragma unroll
  for (int i = kBlock - 1; i >= 0; --i) {
    const int row = block * kBlock + i;
    shared.w[0][row][column] = sum += shared.w[0][row][column] + shared.w[1][row][column];
  }
  shared.of_block[block][column] = sum;
  sync_consumers();
  const int warp = thread / 32, lane = thread % 32, first = warp * 8;
  float below[2] = {}, beta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    beta[half] = shared.vectors[int{kVectors} + int{kBeta}][lane + 32 * half];
#pragma unroll
    for (int b = kBlocks - 1; b > 0; --b)
      if (b > first / kBlock) below[half] += shared.of_block[b][lane + 32 * half];
  }
#pragma unroll
  for (int row = 0; row < 8; ++row) {
    const int t = first + row;
    float passing = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = lane + 32 * half;
      const float of_column = shared.w[0][t][j] + below[half];
      if (j == t) shared.of_beta[t] = of_column;
      if (j < t) passing += of_column * beta[half];
    }
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) passing += __shfl_xor_sync(0xffffffffu, passing, distance);
    if (lane == 0) shared.passing[t] = passing;
  }
}

// A rounded accumulator [C, n] into a tile of rows.
template <class Tile, class Element, int registers>
__device__ void put_rows(char* tile, const float (&x)[registers], int thread) {
  const StmatrixPlace<Tile> place(opaque(thread));
#pragma unroll
  for (int step = 0; step < registers / 8; ++step) {
    uint32_t words[4];
    accumulator_to_a_fragment<Element>(words, x, step);
    stmatrix_x4(tile + place.at(step), words);
  }
}

// The products of a head within the chunk: W and what follows from it, then dP and dM as operands; dP_ij |k_j| factors
// are left in a. x: Q K^T or K K^T, in flight.
template <bool query, class Config>
__device__ void square_products(const GradientThread<Config>& me, typename Config::Tokens& a,
                                typename Config::Tokens& x) {
  using Square = typename Config::Square;
  using Element = typename Config::Element;
  auto& shared = me.shared;
  wgmma_wait_group<0>();
  wgmma_fence_operand(x);
  const SplitSum c[2] = {me.c(me.row(0)), me.c(me.row(1))};
  const float of_row[2] = {me.template of_row<query>(0), me.template of_row<query>(1)};
  for_each_pair(me, [&](int r, int i, int j) {
    const int e = r / 2 % 2;
    const float2 coarse = me.pair(kSumCoarse, j), fine = me.pair(kSumFine, j), key = me.of_keys(j);
    const SplitSum of[2] = {{coarse.x, fine.x}, {coarse.y, fine.y}};
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      if (!query && j + f == i) shared.diagonal[i] = a[r + f];
      // Selected, not multiplied by zero: above the diagonal Γ may be infinite.
      const bool inside = (query ? j + f <= i : j + f < i) && i < me.count;
      a[r + f] = inside ? (query ? me.scale : -1) * a[r + f] * decay_between(c[e], of[f]) : 0;
    }
    *reinterpret_cast<float2*>(&shared.w[query ? 0 : 1][i][j]) =
        make_float2(a[r] * x[r] * of_row[e] * key.x, a[r + 1] * x[r + 1] * of_row[e] * key.y);
  });
  sync_consumers();
  sum_passing(shared, me.thread + (query ? 0 : kWarpgroup));
  sync_consumers();
  const float of_operand_row[2] = {me.template of_row<query>(0), me.template of_row<query>(1)};
  for_each_pair(me, [&](int r, int, int j) {
    const float2 beta = me.pair(kBeta, j), key = me.of_keys(j);
    a[r] *= beta.x, a[r + 1] *= beta.y;
    x[r] = finite_operand<Element>(a[r] * key.x), x[r + 1] = finite_operand<Element>(a[r + 1] * key.y);
    a[r] = finite_operand<Element>(a[r] * of_operand_row[r / 2 % 2]);
    a[r + 1] = finite_operand<Element>(a[r + 1] * of_operand_row[r / 2 % 2]);
  });
  if constexpr (!query) put_rows<Square, Element>(shared.m_key, x, me.thread);
  put_rows<Square, Element>(query ? shared.p_query : shared.m_row, a, me.thread);
  if constexpr (query)
#pragma unroll
    for (int r = 0; r < Config::MmaSquare::registers; ++r) a[r] = x[r];
  fence_proxy_async();
}

}  // namespace jet::hopper
