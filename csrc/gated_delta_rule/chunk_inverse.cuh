// T' = (I + A)^-1 of a strictly lower triangular A [C, C], by one warpgroup. kernels' notes on the precision: docs/chunk_gated_delta_rule.md.
//
// In blocks of 16: the diagonal ones by substitution in fp32, warp b has block b. Then warp j has block column j of T':
//   T'_ij = -T'_ii sum_{j <= m < i} A_im T'_mj       for i = j + 1 ..
// in fp16 with fp32 accumulation. It keeps transposes, so that each product comes out as the A operand of the next.
#pragma once

#include "csrc/gated_delta_rule/chunk_image.h"
#include "csrc/hopper/barrier.h"
#include "csrc/hopper/matrix.h"
#include "csrc/hopper/wgmma.h"

namespace jet::hopper {

struct InverseShared {
  static constexpr int row_floats = kBlock + 4;                 // 16-byte rows whose starts lie in different banks
  alignas(kTileAlign) char blocks[SquareTile::bytes];          // fp16: A below the diagonal, T'_ii on it
  alignas(16) float diagonal[kBlocks][kBlock][row_floats];     // A_ii

  __device__ void put_diagonal(int block, int i, int j, float a0, float a1) {
    *reinterpret_cast<float2*>(&diagonal[block][i][j]) = make_float2(a0, a1);
  }
};

// T'_bb of the warp's block b, to `blocks` and to the image.
__device__ inline void invert_diagonal(InverseShared& shared, char* image, int thread) {
  const int b = thread / 32, j = thread % kBlock;  // a lane per column; both halves of the warp compute the same
  float x[kBlock];
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    float a[kBlock];
    if (i % 4 == 0) compiler_fence();  // four rows at a time: all of them at once would fill the registers
#pragma unroll
    for (int m = 0; m < i; m += 4) {
      const float4 four = *reinterpret_cast<const float4*>(&shared.diagonal[b][i][m]);
      a[m] = four.x, a[m + 1] = four.y, a[m + 2] = four.z, a[m + 3] = four.w;
    }
    x[i] = i == j ? 1 : 0;
#pragma unroll
    for (int m = 0; m < i; ++m) x[i] -= a[m] * x[m];  // (I + A) x = e_j
  }
  const bool to_image = thread % 32 >= kBlock;
#pragma unroll
  for (int i = 0; i < kBlock; ++i) {
    const int row = b * kBlock + i, column = b * kBlock + j;
    char* to = to_image ? image + image_offset(row, column) : shared.blocks + SquareTile::offset(row, column);
    *reinterpret_cast<__half*>(to) = __float2half_rn(x[i]);
  }
}

// Block (i, m) of A, or T'_ii, as the B operand of X A^T.
__device__ inline void load_block(uint32_t (&b)[4], const InverseShared& shared, int thread, int i, int m) {
  load_matrices(b, shared.blocks + SquareTile::offset(i * kBlock + operand_n(thread), m * kBlock + operand_k(thread)));
}

// Block column j = warp of T' below the diagonal, to the image.
__device__ inline void invert_column(const InverseShared& shared, char* image, int thread) {
  const int j = thread / 32, lane = thread % 32;
  uint32_t x[kBlocks][4];  // x[d] = T'_{j + d, j}^T
  load_matrices_transposed(x[0], shared.blocks + SquareTile::offset(j * kBlock + transposed_k(lane), j * kBlock + transposed_m(lane)));
#pragma unroll
  for (int d = 1; d < kBlocks; ++d) {
    const int i = j + d;
    if (i >= kBlocks) break;
    uint32_t b[4], y16[4];
    float y[8] = {}, t[8] = {};
#pragma unroll
    for (int e = 0; e < d; ++e) {
      load_block(b, shared, lane, i, j + e);
      multiply_16(y, x[e], b);  // Yᵀ += T'_mjᵀ A_imᵀ   [16, 16]
    }
#pragma unroll
    for (int r = 0; r < 8; ++r) y[r] = -y[r];
    fragment_of<f16>(y16, y, 0);
    load_block(b, shared, lane, i, i);
    multiply_16(t, y16, b);  // T'_ijᵀ = -Yᵀ T'_iiᵀ   [16, 16]
    fragment_of<f16>(x[d], t, 0);
    store_matrices_transposed(image + image_offset(i * kBlock + transposed_k(lane), j * kBlock + transposed_m(lane)), x[d]);
  }
}

}  // namespace jet::hopper
