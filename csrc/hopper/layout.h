// Where elements lie: shared-memory tiles of wgmma operands (swizzle, core matrices, K-major and MN-major), and the
// registers of accumulators and A operands. All index maps are constexpr and proved at the end of the file; kernels use
// them and write no masks of their own.
#pragma once

#include <cstdint>

#include "csrc/common/dtype.h"

#ifdef __CUDACC__
#define JET_HOST_DEVICE __host__ __device__
#else
#define JET_HOST_DEVICE
#endif

namespace jet::hopper {

// How 16-byte units are permuted inside a tile: the 32-, 64- and 128-byte swizzle of TMA and wgmma. The value is the
// length in bytes of a panel's row (see OperandTile); `none` is the layout of plain core matrices of 8 x 16 bytes.
enum class Swizzle : int { none = 16, b32 = 32, b64 = 64, b128 = 128 };

// Which index of an operand A [M, K] or B [N, K] is contiguous in memory: k (K-major), or m respectively n (MN-major).
enum class Major : int { k, mn };

constexpr int kWarpgroup = 128;   // threads
constexpr int kTileAlign = 1024;  // bytes; the 128-byte swizzle repeats every 8 rows of 128 bytes

// Byte offset in a tile after the hardware's permutation: address bits 4.. are xor-ed with bits 7.. . Tiles start at
// kTileAlign.
JET_HOST_DEVICE constexpr int swizzled(Swizzle swizzle, int offset) {
  const int units = static_cast<int>(swizzle) / 16;
  return offset ^ (((offset >> 7) & (units - 1)) << 4);
}

// The two offsets of a wgmma matrix descriptor (LBO and SBO), in bytes.
struct DescriptorOffsets {
  int leading_byte_offset, stride_byte_offset;
};

// The tile [mn, k] of a wgmma operand in shared memory. The contiguous index is cut into panels one swizzle row wide; a
// panel is [rows][swizzle bytes], so that one TMA box of that shape fills it: CuTe's swizzle atom of 8 rows, repeated
// along the rows. Panels follow each other.
template <class Element_, Swizzle swizzle_, Major major_, int mn_, int k_>
struct OperandTile {
  using Element = Element_;
  static constexpr Swizzle swizzle = swizzle_;
  static constexpr Major major = major_;
  static constexpr int mn = mn_, k = k_;
  static constexpr int row_bytes = static_cast<int>(swizzle);
  static constexpr int panel_width = row_bytes / sizeof(Element);  // elements
  static constexpr int rows = major == Major::k ? mn : k;          // of a panel
  static constexpr int panels = (major == Major::k ? k : mn) / panel_width;
  static constexpr int panel_bytes = rows * row_bytes;
  static constexpr int bytes = panels * panel_bytes;
  static_assert(panels * panel_width == (major == Major::k ? k : mn), "a tile is made of whole panels");
  static_assert(rows % 8 == 0, "the hardware reads 8 rows at a time");
  static_assert(major == Major::k || sizeof(Element) == 2, "wgmma transposes 16-bit elements only");

  // Byte offset of the element (i, l), i < mn, l < k.
  JET_HOST_DEVICE static constexpr int offset(int i, int l) {
    const int row = major == Major::k ? i : l, column = major == Major::k ? l : i;
    const int in_panel = row * row_bytes + column % panel_width * static_cast<int>(sizeof(Element));
    return column / panel_width * panel_bytes + swizzled(swizzle, in_panel);
  }

  // Byte offset at which a descriptor of the operand that begins at (i, l) starts; i and l are multiples of the
  // instruction's shape.
  JET_HOST_DEVICE static constexpr int start(int i, int l) {
    const int row = major == Major::k ? i : l, column = major == Major::k ? l : i;
    return column / panel_width * panel_bytes + row * row_bytes +
           column % panel_width * static_cast<int>(sizeof(Element));
  }

  // PTX ISA, matrix descriptor of wgmma. Unswizzled tiles exchange the roles of the two offsets when MN is contiguous.
  JET_HOST_DEVICE static constexpr DescriptorOffsets descriptor_offsets() {
    const int eight_rows = 8 * row_bytes;
    if (swizzle != Swizzle::none)
      return {major == Major::k ? 16 : panel_bytes, eight_rows};  // K-major: the leading one is not read
    return major == Major::k ? DescriptorOffsets{panel_bytes, eight_rows} : DescriptorOffsets{eight_rows, panel_bytes};
  }
};

// Accumulator of wgmma m64nN: register r of thread t holds D[row, column].
JET_HOST_DEVICE constexpr int accumulator_row(int thread, int r) {
  return thread / 32 * 16 + thread % 32 / 4 + r / 2 % 2 * 8;
}
JET_HOST_DEVICE constexpr int accumulator_column(int thread, int r) { return r / 4 * 8 + thread % 4 * 2 + r % 2; }

// A operand of wgmma m64k16 in registers, 16-bit elements: element e (0, 1) of register i (0..3) of thread t is
// A[row, k].
JET_HOST_DEVICE constexpr int a_fragment_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i % 2 * 8;
}
JET_HOST_DEVICE constexpr int a_fragment_k(int thread, int i, int e) { return i / 2 * 8 + thread % 4 * 2 + e; }

namespace proof {

// The address that the hardware computes from a descriptor for element (i, l) of an operand (PTX ISA, canonical
// layouts; T = 16 bytes).
template <class Element>
constexpr int hardware_address(Swizzle swizzle, Major major, int start, DescriptorOffsets s, int i, int l) {
  constexpr int unit = 16 / sizeof(Element);
  const int row_bytes = static_cast<int>(swizzle), bytes = static_cast<int>(sizeof(Element));
  const int width = row_bytes / bytes;
  if (major == Major::k) {
    const int column = swizzle == Swizzle::none ? l / unit * s.leading_byte_offset + l % unit * bytes : l * bytes;
    return swizzled(swizzle, start + i / 8 * s.stride_byte_offset + i % 8 * row_bytes + column);
  }
  const int per_panel = swizzle == Swizzle::none ? s.stride_byte_offset : s.leading_byte_offset,
            per_rows = swizzle == Swizzle::none ? s.leading_byte_offset : s.stride_byte_offset;
  return swizzled(swizzle, start + i / width * per_panel + i % width * bytes + l / 8 * per_rows + l % 8 * row_bytes);
}

template <class Tile, class Element>
constexpr bool descriptor_addresses_the_tile() {
  const int step_k = 32 / sizeof(Element);
  for (int l0 = 0; l0 < Tile::k; l0 += step_k)
    for (int i = 0; i < Tile::mn; ++i)
      for (int l = 0; l < step_k; ++l)
        if (hardware_address<Element>(Tile::swizzle, Tile::major, Tile::start(0, l0), Tile::descriptor_offsets(), i,
                                      l) != Tile::offset(i, l0 + l))
          return false;
  return true;
}

template <class Tile, class Element>
constexpr bool tile_is_a_permutation() {
  bool used[Tile::bytes / sizeof(Element)] = {};
  for (int i = 0; i < Tile::mn; ++i)
    for (int l = 0; l < Tile::k; ++l) {
      const int at = Tile::offset(i, l) / static_cast<int>(sizeof(Element));
      if (used[at]) return false;
      used[at] = true;
    }
  return true;
}

template <Swizzle swizzle, Major major>
constexpr bool tile_holds() {
  using Tile = OperandTile<uint16_t, swizzle, major, 64, 64>;
  return tile_is_a_permutation<Tile, uint16_t>() && descriptor_addresses_the_tile<Tile, uint16_t>();
}
static_assert(tile_holds<Swizzle::none, Major::k>() && tile_holds<Swizzle::none, Major::mn>());
static_assert(tile_holds<Swizzle::b32, Major::k>() && tile_holds<Swizzle::b32, Major::mn>());
static_assert(tile_holds<Swizzle::b64, Major::k>() && tile_holds<Swizzle::b64, Major::mn>());
static_assert(tile_holds<Swizzle::b128, Major::k>() && tile_holds<Swizzle::b128, Major::mn>());

constexpr bool accumulator_is_a_permutation(int columns) {
  bool used[64 * 16] = {};
  for (int t = 0; t < kWarpgroup; ++t)
    for (int r = 0; r < columns / 2; ++r) {
      bool& seen = used[accumulator_row(t, r) * columns + accumulator_column(t, r)];
      if (seen) return false;
      seen = true;
    }
  return true;
}
static_assert(accumulator_is_a_permutation(16));

// Columns 16 s .. 16 s + 15 of an accumulator, rounded to 16 bits in register order, are the A operand of k16 step s.
constexpr bool accumulator_is_an_a_fragment() {
  for (int t = 0; t < kWarpgroup; ++t)
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < 2; ++e)
        if (accumulator_row(t, 2 * i + e) != a_fragment_row(t, i) ||
            accumulator_column(t, 2 * i + e) != a_fragment_k(t, i, e))
          return false;
  return true;
}
static_assert(accumulator_is_an_a_fragment());

}  // namespace proof
}  // namespace jet::hopper
