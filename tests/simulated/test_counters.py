"""Counters of kernels whose tiling is known, against numbers computed by hand."""

import pytest
from kernel_library import Gemm

import hoppersim

TILE_M = TILE_N = 128  # of gemm.h
TILE_K = 64
SIZE = 256  # 2 x 2 CTAs, 4 stages of K each
CTAS, STEPS = 4, SIZE // TILE_K
TILE_BYTES = TILE_M * TILE_K * 2  # an operand's tile in a stage, 16 KiB
CONSUMER_WARPS = 8


def counters(source_of_a: str = "ss", swizzle: int = 128, size=(SIZE, SIZE, SIZE), multicast: bool = False) -> dict:
    gemm = Gemm(*size)
    gemm.run("gemm_multicast") if multicast else gemm.variant("bf16", source_of_a, swizzle)
    return hoppersim.last_counters()


@pytest.mark.parametrize("source_of_a", ["ss", "rs"])
def test_tensor_flop(source_of_a):
    assert counters(source_of_a)["tensor_flop"] == 2 * SIZE**3


def test_tensor_flop_counts_whole_tiles():
    assert counters(size=(130, 74, 200))["tensor_flop"] == 2 * (2 * TILE_M) * TILE_N * (4 * TILE_K)


@pytest.mark.parametrize("swizzle", [16, 128])
def test_bulk_bytes(swizzle):
    assert counters(swizzle=swizzle)["bulk_read_bytes"] == CTAS * STEPS * 2 * TILE_BYTES


def test_bulk_bytes_in_bounds_only():
    m, n, k = 130, 74, 200
    assert counters(size=(m, n, k))["bulk_read_bytes"] == 2 * (m * k + 2 * n * k)  # two tiles of M: B is loaded twice


def test_multicast_reads_b_once_per_cluster():
    assert counters(multicast=True)["bulk_read_bytes"] == CTAS * STEPS * TILE_BYTES + CTAS // 2 * STEPS * TILE_BYTES


def test_global_sectors():
    # A warp's store of one accumulator register: 8 rows of 4 lanes, 8 bytes apart, that is one 32-byte sector per row.
    stores = CTAS * CONSUMER_WARPS * (64 * TILE_N // 128)
    c = counters()
    assert c["global_write_sectors"] == stores * 8
    assert c["global_write_bytes"] == SIZE * SIZE * 4
    assert c["global_read_sectors"] == 0  # all operands come by TMA


@pytest.mark.parametrize("swizzle", [16, 32, 64, 128])
def test_ldmatrix_wavefronts(swizzle):
    # ldmatrix.x4 moves 512 bytes: 4 wavefronts where the 8 rows of each matrix lie in different banks, as in every
    # swizzle of its width.
    loads = CTAS * CONSUMER_WARPS * STEPS * (TILE_K // 16)
    c = counters("rs", swizzle)
    assert c["instructions"]["ldmatrix"] == loads
    assert c["shared_ideal_wavefronts"] == loads * 4
    assert c["shared_wavefronts"] == loads * 4


@pytest.mark.parametrize("source_of_a, core_matrices", [("ss", (64 + TILE_N) * 32 // 128), ("rs", TILE_N * 32 // 128)])
def test_wgmma_wavefronts(source_of_a, core_matrices):
    # Each wgmma reads 32 bytes of 64 rows of A (from shared memory or not) and of 128 rows of B: core matrices of 128
    # bytes.
    warpgroups, instructions = CTAS * CONSUMER_WARPS // 4, STEPS * (TILE_K // 16)
    assert counters(source_of_a)["wgmma_wavefronts"] == warpgroups * instructions * core_matrices


STRIDED = """
.version 8.8
.target sm_90a
.address_size 64
.visible .entry strided(.param .u32 stride)
{
  .shared .align 16 .b8 buffer[4224];
  .reg .b32 %r<8>;
  mov.u32 %r0, %tid.x;
  ld.param.u32 %r1, [stride];
  mul.lo.u32 %r2, %r0, %r1;
  mov.u32 %r3, buffer;
  add.u32 %r4, %r3, %r2;
  mov.u32 %r0, 7;
  st.shared.u32 [%r4], %r0;
  ld.shared.u32 %r5, [%r4];
  ret;
}
"""


@pytest.mark.parametrize("words, factor", [(0, 1), (1, 1), (2, 2), (3, 1), (4, 4), (8, 8), (16, 16), (32, 32), (33, 1)])
def test_conflict_factor(words, factor):
    c = hoppersim.Module(STRIDED).launch("strided", 1, 32, (4 * words,))
    assert c["shared_accesses"] == 2 and c["shared_ideal_wavefronts"] == 2
    assert c["shared_wavefronts"] == 2 * factor


VECTOR = (
    STRIDED.replace("4224", "33792")
    .replace("st.shared.u32 [%r4], %r0", "st.shared.WIDTH.u32 [%r4], VALUES")
    .replace("ld.shared.u32 %r5, [%r4]", "ld.shared.WIDTH.u32 VALUES, [%r4]")
)


# Lanes of 8 bytes go in two phases of 16, lanes of 16 bytes in four of 8; a phase is one wavefront where its words lie
# in different banks.
@pytest.mark.parametrize(
    "width, stride, factor",
    [
        (2, 2, 1),
        (2, 0, 1),
        (2, 4, 2),
        (2, 6, 1),
        (2, 32, 16),
        (4, 4, 1),
        (4, 0, 1),
        (4, 8, 2),
        (4, 12, 1),
        (4, 20, 1),
        (4, 32, 8),
    ],
)
def test_conflict_factor_of_vectors(width, stride, factor):
    values = "{" + ", ".join(f"%r{r}" for r in range(width)) + "}"
    c = hoppersim.Module(VECTOR.replace("WIDTH", f"v{width}").replace("VALUES", values)).launch(
        "strided", 1, 32, (4 * stride,)
    )
    assert c["shared_accesses"] == 2 and c["shared_ideal_wavefronts"] == 2 * width
    assert c["shared_wavefronts"] == 2 * width * factor


def test_counters_do_not_depend_on_the_schedule():
    gemm = Gemm(140, 72, 330)
    seen = []
    for seed in range(4):
        gemm.variant("bf16", "ss", 128, seed=seed)
        c = hoppersim.last_counters()
        seen.append({name: c[name] for name in c if name not in ("barrier_waits", "warp_instructions", "instructions")})
    assert all(c == seen[0] for c in seen)
