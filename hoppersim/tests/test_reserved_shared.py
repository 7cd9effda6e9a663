"""%reserved_smem_offset_…, the sizes of shared memory, and what cooperative groups do with them."""

import numpy as np
import pytest
from lane_ptx import fault_of, kernel

import hoppersim

SOURCE = r"""
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
namespace cg = cooperative_groups;

// A tile of several warps keeps its barriers and its exchange in the reserved part.
__global__ void sums(const int* x, int* y) {
  __shared__ cg::block_tile_memory<256> memory;
  const auto block = cg::this_thread_block(memory);
  const auto tile = cg::tiled_partition<64>(block);
  const int sum = cg::reduce(tile, x[threadIdx.x], cg::plus<int>());
  tile.sync();
  y[threadIdx.x] = sum;
}
extern "C" int run(const int* x, int* y) { return sums<<<1, 256>>>(x, y), cudaGetLastError(); }
"""


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("seed", range(3))
def test_tiles_of_several_warps(timing, seed):
    library = hoppersim.compile_cuda(SOURCE)
    x, y = np.arange(256, dtype=np.int32), np.zeros(256, np.int32)
    with hoppersim.simulate(timing=timing, seed=seed):
        assert library.call("run", x, y) == 0
    np.testing.assert_array_equal(y, np.repeat(x.reshape(4, 64).sum(1), 64))


def sizes(*names: str, shared: int = 0) -> list[int]:
    out = np.zeros(len(names), np.uint32)
    body = "".join(f"mov.u32 %r1, {name};\nst.global.u32 [%rd0+{4 * i}], %r1;\n" for i, name in enumerate(names))
    text = kernel("setp.ne.u32 %p1, %r0, 0;\n@%p1 bra END;\n" + body + "END:\n", declare=".shared .b8 s[256];\n")
    hoppersim.Module(text.replace("END:", "mov.u32 %r1, s;\nEND:")).launch("k", 1, 32, (out,), shared=shared)
    return out.tolist()


def test_sizes():
    names = ("%dynamic_smem_size", "%total_smem_size", "%aggr_smem_size")
    assert sizes(*names, shared=1000) == [1000, 1256, 1256 + 1024]


def test_offsets():
    offsets = ("begin", "end", "cap", "0", "1")
    begin, end, cap, first, second = sizes(*(f"%reserved_smem_offset_{name}" for name in offsets))
    assert (begin, end, cap) == (0, 1024, 1024)
    assert begin <= first <= second and second + 288 <= end  # what cooperative groups expect


WRITE = "st.shared.u32 [{}], %r0;\n"


def test_the_reserved_part_belongs_to_kernels_that_ask_for_it():
    ask = "mov.u32 %r1, %reserved_smem_offset_1;\n"
    out = np.zeros(32, np.uint32)
    body = ask + "shl.b32 %r2, %r0, 2;\nadd.u32 %r1, %r1, %r2;\n" + WRITE.format("%r1") + "ld.shared.u32 %r3, [%r1];\n"
    body += "mul.wide.u32 %rd1, %r0, 4;\nadd.u64 %rd1, %rd1, %rd0;\nst.global.u32 [%rd1], %r3;\n"
    hoppersim.Module(kernel(body)).launch("k", 1, 32, (out,))
    np.testing.assert_array_equal(out, np.arange(32))
    assert fault_of(kernel(WRITE.format("600")), (out,)).kind == "out-of-bounds shared"
    assert fault_of(kernel(ask + WRITE.format("8")), (out,)).kind == "out-of-bounds shared"
