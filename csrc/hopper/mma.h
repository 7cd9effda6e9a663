// ldmatrix, stmatrix and mma.sync: 8 x 8 matrices of 16-bit elements between shared memory and the registers of a
// warp, and the product of one warp.
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "csrc/hopper/convert.h"
#include "csrc/hopper/layout.h"

namespace jet::hopper {

// Addresses of ldmatrix.x4.trans and stmatrix.x4.trans. Memory holds X^T, rows of 8 consecutive m for each k; registers
// hold X as the A operand of m16k16 or as 16 columns of an accumulator (layout.h). Lane t passes the address of the row
// of 8 elements that begins at (m, k).
JET_HOST_DEVICE constexpr int ldmatrix_trans_k(int thread) { return thread % 32 / 16 * 8 + thread % 8; }
JET_HOST_DEVICE constexpr int ldmatrix_trans_m(int thread) { return thread / 32 * 16 + thread % 16 / 8 * 8; }

// Addresses of ldmatrix.x4 for the B operands [n, k] of two m16n8k16. Memory has rows of 8 consecutive k; registers 0,
// 1 are n 0..7, registers 2, 3 are n 8..15. Lane t passes the address of the row of 8 elements that begins at (n, k).
JET_HOST_DEVICE constexpr int ldmatrix_b_n(int thread) { return thread % 32 / 16 * 8 + thread % 8; }
JET_HOST_DEVICE constexpr int ldmatrix_b_k(int thread) { return thread % 16 / 8 * 8; }

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: four matrices; lane t passes the address of row t % 8 of matrix t / 8.
__device__ inline void ldmatrix_x4(uint32_t (&x)[4], const char* row) {
  cute::SM75_U32x4_LDSM_N::copy(*reinterpret_cast<const cute::uint128_t*>(row), x[0], x[1], x[2], x[3]);
}
// ldmatrix .trans
__device__ inline void ldmatrix_x4_trans(uint32_t (&x)[4], const char* row) {
  cute::SM75_U16x8_LDSM_T::copy(*reinterpret_cast<const cute::uint128_t*>(row), x[0], x[1], x[2], x[3]);
}
// stmatrix.sync.aligned.m8n8.x4.shared.b16: lane t passes the address of row t % 8 of matrix t / 8. Memory has rows of
// 8 consecutive columns; with the addresses below it holds 16 columns of an accumulator that have been rounded.
JET_HOST_DEVICE constexpr int stmatrix_row(int thread) { return thread / 32 * 16 + thread % 16; }
JET_HOST_DEVICE constexpr int stmatrix_column(int thread) { return thread % 32 / 16 * 8; }
__device__ inline void stmatrix_x4(char* row, const uint32_t (&x)[4]) {
  cute::SM90_U32x4_STSM_N::copy(x[0], x[1], x[2], x[3], *reinterpret_cast<cute::uint128_t*>(row));
}
// stmatrix.sync.aligned.m8n8.x4.trans.shared.b16
__device__ inline void stmatrix_x4_trans(char* row, const uint32_t (&x)[4]) {
  cute::SM90_U16x8_STSM_T::copy(x[0], x[1], x[2], x[3], *reinterpret_cast<cute::uint128_t*>(row));
}

// Two mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32, or .bf16.bf16: D [16, 16] += A [16, 16] B [16, 16]^T. d is
// laid out as 16 columns of a wgmma accumulator.
template <class Element = f16>
__device__ void mma_m16n16k16(float (&d)[8], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  using Mma = std::conditional_t<std::is_same_v<Element, f16>, cute::SM80_16x8x16_F32F16F16F32_TN,
                                 cute::SM80_16x8x16_F32BF16BF16F32_TN>;
#pragma unroll
  for (int n = 0; n < 2; ++n)
    Mma::fma(d[4 * n], d[4 * n + 1], d[4 * n + 2], d[4 * n + 3], a[0], a[1], a[2], a[3], b[2 * n], b[2 * n + 1],
             d[4 * n], d[4 * n + 1], d[4 * n + 2], d[4 * n + 3]);
}

namespace proof {

// ldmatrix.trans gives register i of lane t the elements k = 2 (t % 4), + 1 of column t / 4 of matrix i.
constexpr bool ldmatrix_trans_fills_the_a_fragment() {
  for (int t = 0; t < kWarpgroup; ++t)
    for (int i = 0; i < 4; ++i) {
      const int source = t / 32 * 32 + 8 * i;
      if (ldmatrix_trans_m(source) + t % 32 / 4 != a_fragment_row(t, i) ||
          ldmatrix_trans_k(source) + t % 4 * 2 != a_fragment_k(t, i, 0))
        return false;
    }
  return true;
}
static_assert(ldmatrix_trans_fills_the_a_fragment());

// Register i of stmatrix comes from matrix i: of rows and columns of an A fragment.
constexpr bool stmatrix_stores_the_a_fragment() {
  for (int t = 0; t < kWarpgroup; ++t)
    for (int i = 0; i < 4; ++i) {
      const int source = t / 32 * 32 + 8 * i;
      if (stmatrix_row(source) + t % 32 / 4 != a_fragment_row(t, i) ||
          stmatrix_column(source) + t % 4 * 2 != a_fragment_k(t, i, 0))
        return false;
    }
  return true;
}
static_assert(stmatrix_stores_the_a_fragment());

// mma.sync m16n8k16: register i of B of lane t is n = t / 4, k = 8 i + 2 (t % 4), + 1.
constexpr bool ldmatrix_fills_the_b_operands() {
  for (int t = 0; t < 32; ++t)
    for (int i = 0; i < 4; ++i) {
      const int source = 8 * i + t / 4;
      if (ldmatrix_b_n(source) != i / 2 * 8 + t / 4 || ldmatrix_b_k(source) != i % 2 * 8) return false;
    }
  return true;
}
static_assert(ldmatrix_fills_the_b_operands());

}  // namespace proof
}  // namespace jet::hopper
