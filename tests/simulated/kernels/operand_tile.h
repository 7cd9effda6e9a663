// Copies of a whole operand tile (csrc/hopper/layout.h) that the tests' GEMMs make and no product kernel does.
#pragma once

#include "csrc/hopper/mma.h"
#include "csrc/hopper/tma.h"

namespace jet::hopper::test {

// cp.async.bulk.tensor: panel p of the tile is the box at (column + p * panel_width, row).
template <class Tile>
__device__ void tma_load_tile(char* shared, const CUtensorMap& map, Mbarrier& barrier, CacheHint hint, int column,
                              int row) {
#pragma unroll
  for (int p = 0; p < Tile::panels; ++p)
    tma_load(shared + p * Tile::panel_bytes, map, barrier, hint, column + p * Tile::panel_width, row);
}

// ldmatrix.x4 that fills the A operand of wgmma m64k16: thread t passes the address of the row of 8 elements that
// begins at (row, k).
JET_HOST_DEVICE constexpr int ldmatrix_a_row(int thread) { return thread / 32 * 16 + thread % 16; }
JET_HOST_DEVICE constexpr int ldmatrix_a_k(int thread) { return thread % 32 / 16 * 8; }

// The A operand [64, 16] at (i, l) of a K-major tile; all four warps of the warpgroup.
template <class Tile>
__device__ void ldmatrix_a(uint32_t (&a)[4], const char* tile, int thread, int i, int l) {
  static_assert(Tile::major == Major::k, "ldmatrix reads rows of 8 consecutive k");
  ldmatrix_x4(a, tile + Tile::offset(i + ldmatrix_a_row(thread), l + ldmatrix_a_k(thread)));
}

// ldmatrix gives register i of lane t the elements 2 (t % 4), + 1 of the row whose address lane 8 i + t / 4 of its warp
// passed.
constexpr bool ldmatrix_fills_the_a_fragment() {
  for (int t = 0; t < kWarpgroup; ++t)
    for (int i = 0; i < 4; ++i) {
      const int source = t / 32 * 32 + 8 * i + t % 32 / 4;
      if (ldmatrix_a_row(source) != a_fragment_row(t, i) || ldmatrix_a_k(source) + t % 4 * 2 != a_fragment_k(t, i, 0))
        return false;
    }
  return true;
}
static_assert(ldmatrix_fills_the_a_fragment());

}  // namespace jet::hopper::test
