// The shared-memory matrix descriptor of wgmma.
//
// bits  0-13 start address / 16     bits 16-29 leading byte offset / 16     bits 32-45 stride byte offset / 16
// bits 49-51 base offset            bits 62-63 swizzle: 0 none, 1 128 B, 2 64 B, 3 32 B
//
// An operand tile is a set of 16-byte units (16 elements of 8 bits, 8 of 16, 4 of 32). W = 1, 2, 4, 8 is the width of
// the swizzle atom in units. Unswizzled address of a unit, relative to the start address (LBO, SBO: leading, stride
// byte offset):
//
//   K-major,  row r, unit j of K (*):            (r % 8) * 16 W + (r / 8) * SBO + (W == 1 ? j * LBO : j * 16)
//   MN-major, unit u of MN, column k, W = 1:     u * SBO + (k % 8) * 16 + (k / 8) * LBO
//   MN-major, unit u of MN, column k, W > 1:     (u % W) * 16 + (u / W) * LBO + (k % 8) * 16 W + (k / 8) * SBO
//
// (*) j = 0, 1; B of a sparse product: j = 0 … 3, because its K is twice that of the stored A.
//
// These are the canonical layouts of cute/atom/mma_traits_sm90_gmma.hpp. The swizzle then exchanges 16-byte units:
// address bits [4, 4 + log2 W) are XORed with bits [7, 7 + log2 W). It acts on absolute shared-memory addresses, not on
// offsets in the tile: that is why atoms must lie on multiples of 8 * 16 W bytes, and why a kernel may step along K
// inside an atom by adding the byte offset (32 for 16 values of bf16) to the start address alone. The copy engine
// swizzles the same way. The base offset, for tiles that start elsewhere, is not modelled: a descriptor that has one is
// a fault, and so is one of such a tile that has none.
#include <stdexcept>

#include "tensor.h"

namespace hoppersim {

MatrixDescriptor::MatrixDescriptor(uint64_t bits)
    : start((bits & 0x3fff) << 4), leading((bits >> 16 & 0x3fff) << 4), stride((bits >> 32 & 0x3fff) << 4) {
  if (bits >> 49 & 7) throw std::invalid_argument("matrix descriptor with a base offset");
  constexpr int kSwizzleOfLayout[4] = {0, 3, 2, 1};
  swizzle = kSwizzleOfLayout[bits >> 62];
}

bool MatrixDescriptor::aligned() const { return (start >> 7 & ((1u << swizzle) - 1)) == 0; }

uint32_t MatrixDescriptor::swizzled(uint32_t address) const {
  uint32_t field = (1u << swizzle) - 1;
  return address ^ ((address >> 7 & field) << 4);
}

void MatrixDescriptor::units_k_major(int first, int count, uint32_t units, std::vector<uint32_t>& out) const {
  if (units > (1u << swizzle) && swizzle != 0)
    throw std::invalid_argument("matrix descriptor whose swizzle span is shorter than a row");
  uint32_t pitch = 16u << swizzle, step = swizzle == 0 ? leading : 16;
  for (int r = first; r < first + count; ++r) {
    uint32_t row = start + r % 8 * pitch + r / 8 * stride;
    for (uint32_t u = 0; u < units; ++u) out.push_back(swizzled(row + u * step));
  }
}

void MatrixDescriptor::units_mn_major(int first, int count, int depth, std::vector<uint32_t>& out) const {
  uint32_t width = 1u << swizzle, pitch = 16u << swizzle;
  for (uint32_t u = first / 8; u < static_cast<uint32_t>(first + count) / 8; ++u) {
    uint32_t column = start + (swizzle == 0 ? u * stride : u % width * 16 + u / width * leading);
    for (uint32_t k = 0; k < static_cast<uint32_t>(depth); ++k) {
      out.push_back(swizzled(column + k % 8 * pitch + k / 8 * (swizzle == 0 ? leading : stride)));
    }
  }
}

}  // namespace hoppersim
