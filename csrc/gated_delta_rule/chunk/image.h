// What `prepare` leaves for `sweep` of each chunk and value head: an image of shared memory, loaded by bulk copies
// (cp.async.bulk).
//   T'      (I + kk diag(beta))^-1                    [C, C] fp16, lower triangle
//   P'      tril(Qn Kn^T ∘ Γ) diag(|k_j| beta_j)      [C, C] fp16, lower triangle: P U = scale |q_i| P' U'
//   vectors Vector::count times [C] fp32
// Kn, Qn: rows of K and Q divided by their norms, whatever l2norm_qk says: fp16 holds them at any scale. The norms come
// back as factors: |k_j| is 1 and |q_i| is 1 with l2norm_qk.
#pragma once

#include "csrc/gated_delta_rule/chunk/chunk_gated_delta_rule.h"
#include "csrc/hopper/layout.h"

namespace jet::hopper {

constexpr int C = static_cast<int>(kChunk);
constexpr int kValueTile = 64;  // value columns of a tile, the rows of a warpgroup's wgmma
JET_HOST_DEVICE constexpr int64_t value_tiles(int64_t V) { return (V + kValueTile - 1) / kValueTile; }
// The triangles are cut into blocks of 16 x 16: those above the diagonal are neither stored nor loaded.
constexpr int kBlock = 16;
constexpr int kBlocks = C / kBlock;  // per side

// A [C, C] operand, row i and column j with j contiguous. A panel is one block wide.
using SquareTile = OperandTile<f16, Swizzle::b32, Major::k, C, C>;
static_assert(SquareTile::panel_width == kBlock && SquareTile::panels == kBlocks);

// Where panel p's stored rows, kBlock p .. C - 1, begin: in the tile, and in the image, which has nothing between them.
JET_HOST_DEVICE constexpr int panel_in_tile(int p) {
  return p * SquareTile::panel_bytes + p * kBlock * SquareTile::row_bytes;
}
JET_HOST_DEVICE constexpr int panel_in_image(int p) {
  return (p * C - kBlock * (p * (p - 1) / 2)) * SquareTile::row_bytes;
}
JET_HOST_DEVICE constexpr int stored_bytes(int p) { return (C - kBlock * p) * SquareTile::row_bytes; }
constexpr int kTriangleBytes = panel_in_image(kBlocks);

// Byte offset of element (i, j), i / kBlock >= j / kBlock, in the image.
JET_HOST_DEVICE constexpr int image_offset(int i, int j) {
  const int p = j / kBlock;
  return SquareTile::offset(i, j) - panel_in_tile(p) + panel_in_image(p);
}

// Byte offset, in tile and image alike, of element (i, j) of a block behind the block's first element.
JET_HOST_DEVICE constexpr int in_block(int i, int j) { return SquareTile::offset(i, j); }

enum Vector : int {
  kReadK,     // e^{c_j} |k_j|: of S^T k_j
  kWrite,     // beta_j e^{c_C - c_j} |k_j|: of U'_j on its way into the state
  kReadQ,     // e^{c_i}: of S^T q_i
  kOutput,    // scale |q_i|
  kInverseK,  // 1 / |k_j| of the row in memory
  kInverseQ,  // 1 / |q_i|
  kVectors
};

constexpr int kVectorsAt = 2 * kTriangleBytes;
constexpr int kVectorBytes = C * 4;
constexpr int kImageBytes = kVectorsAt + kVectors * kVectorBytes;
static_assert(kTriangleBytes == 5120 && kImageBytes % 16 == 0);

// What it leaves for the backward: the same, but P'' = diag(scale |q_i|) P' in P's place and in the dtype of q, so that
// dO meets it as it is, and behind it
//   gates  Gate::count times [C] fp32
enum Gate : int {
  kSumCoarse,  // c, split (prepare.cuh)
  kSumFine,
  kBeta,
  kGates
};
constexpr int kGatesAt = kImageBytes;
constexpr int kBackwardImageBytes = kGatesAt + kGates * kVectorBytes;
static_assert(kBackwardImageBytes % 128 == 0);

namespace proof {

// A panel copied from image to tile arrives with the swizzle that the tile needs.
constexpr bool image_is_a_part_of_the_tile() {
  for (int i = 0; i < C; ++i)
    for (int j = 0; j / kBlock <= i / kBlock && j < C; ++j) {
      const int p = j / kBlock, in_panel = i * SquareTile::row_bytes + j % kBlock * 2;
      const int compact = panel_in_image(p) + in_panel - p * kBlock * SquareTile::row_bytes;
      if (image_offset(i, j) != swizzled(SquareTile::swizzle, compact)) return false;
      if (image_offset(i, j) < panel_in_image(p) || image_offset(i, j) >= panel_in_image(p) + stored_bytes(p))
        return false;
    }
  return true;
}
static_assert(image_is_a_part_of_the_tile());

// The swizzle repeats within a block, so that an element's place is its block's plus its own.
constexpr bool blocks_are_alike() {
  for (int i = 0; i < C; ++i)
    for (int j = 0; j < C; ++j) {
      const int block_i = i / kBlock * kBlock, block_j = j / kBlock * kBlock, inside = in_block(i % kBlock, j % kBlock);
      if (SquareTile::offset(i, j) != SquareTile::offset(block_i, block_j) + inside) return false;
      if (j <= i && image_offset(i, j) != image_offset(block_i, block_j) + inside) return false;
    }
  return true;
}
static_assert(blocks_are_alike());

}  // namespace proof
}  // namespace jet::hopper
