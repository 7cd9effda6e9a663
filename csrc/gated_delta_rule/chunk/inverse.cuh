// T' = (I + A)^-1 of a strictly lower triangular A [C, C], by one warpgroup: the UT transform (flash-linear-attention:
// solve_tril). Its precision: docs/chunk_gated_delta_rule.md.
//
// In blocks of 16: the diagonal ones by substitution in fp32, a half-warp has one. Then warp j has block column j of
// T':
//   T'_ij = -T'_ii sum_{j <= m < i} A_im T'_mj       for i = j + 1 ..
// in fp16 with fp32 accumulation. It keeps transposes, so that each product comes out as the A operand of the next.
#pragma once

#include "csrc/gated_delta_rule/chunk/image.h"
#include "csrc/hopper/barrier.h"
#include "csrc/hopper/mma.h"
#include "csrc/hopper/wgmma.h"

namespace jet::hopper {

struct InverseShared {
  static constexpr int row_floats = kBlock + 4;                      // 16-byte rows whose starts lie in different banks
  static constexpr int block_floats = kBlock * row_floats + kBlock;  // the blocks of a warp's two halves too
  alignas(kTileAlign) char blocks[SquareTile::bytes];                // fp16: A below the diagonal blocks
  alignas(16) float diagonal[kBlocks * block_floats];                // A_ii

  __device__ float* diagonal_at(int block, int i, int j) {
    return diagonal + block * block_floats + i * row_floats + j;
  }
  __device__ void put_diagonal(int block, int i, int j, float a0, float a1) {
    *reinterpret_cast<float2*>(diagonal_at(block, i, j)) = make_float2(a0, a1);
  }
};

// T'_bb of all blocks b, by two warps, to the image.
__device__ inline void invert_diagonal(InverseShared& shared, char* image, int thread) {
  const int b = thread / kBlock, j = thread % kBlock;  // a lane per column
  float x[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    float a[kBlock];
    if (i % 4 == 0) compiler_fence();  // four rows at a time: all of them at once would fill the registers
#pragma unroll
    for (int m = 0; m < i; m += 4) {
      const float4 four = *reinterpret_cast<const float4*>(shared.diagonal_at(b, i, m));
      a[m] = four.x, a[m + 1] = four.y, a[m + 2] = four.z, a[m + 3] = four.w;
    }
    x[i] = i == j ? 1 : 0;
#pragma unroll
    for (int m = 0; m < i; ++m) x[i] -= a[m] * x[m];  // (I + A) x = e_j
  }
#pragma unroll
  for (int i = 0; i < kBlock; ++i)
    *reinterpret_cast<__half*>(image + image_offset(b * kBlock, b * kBlock) + in_block(i, j)) = __float2half_rn(x[i]);
}

// Block (i, m) of A, i > m, as the B operand of X A^T; T'_ii likewise.
__device__ inline void load_block(uint32_t (&b)[4], const InverseShared& shared, int lane, int i, int m) {
  ldmatrix_x4(
      b, shared.blocks + SquareTile::offset(i * kBlock, m * kBlock) + in_block(ldmatrix_b_n(lane), ldmatrix_b_k(lane)));
}
__device__ inline void load_inverse(uint32_t (&b)[4], const char* image, int lane, int i) {
  ldmatrix_x4(b, image + image_offset(i * kBlock, i * kBlock) + in_block(ldmatrix_b_n(lane), ldmatrix_b_k(lane)));
}

// Block column j = warp of T' below the diagonal, to the image.
__device__ inline void invert_column(const InverseShared& shared, char* image, int thread) {
  const int j = thread / 32, lane = thread % 32;
  uint32_t x[kBlocks][4];  // x[d] = T'_{j + d, j}^T
  const int transposed = in_block(ldmatrix_trans_k(lane), ldmatrix_trans_m(lane));
  ldmatrix_x4_trans(x[0], image + image_offset(j * kBlock, j * kBlock) + transposed);
#pragma unroll
  for (int d = 1; d < kBlocks; ++d) {
    const int i = j + d;
    if (i >= kBlocks) break;
    uint32_t b[4], y16[4];
    float y[8] = {}, t[8] = {};
#pragma unroll
    for (int e = 0; e < d; ++e) {
      load_block(b, shared, lane, i, j + e);
      mma_m16n16k16(y, x[e], b);  // Yᵀ += T'_mjᵀ A_imᵀ   [16, 16]
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) y[r] = -y[r];
    accumulator_to_a_fragment<f16>(y16, y, 0);
    load_inverse(b, image, lane, i);
    mma_m16n16k16(t, y16, b);  // T'_ijᵀ = -Yᵀ T'_iiᵀ   [16, 16]
    accumulator_to_a_fragment<f16>(x[d], t, 0);
    stmatrix_x4_trans(image + image_offset(i * kBlock, j * kBlock) + transposed, x[d]);
  }
}

}  // namespace jet::hopper
