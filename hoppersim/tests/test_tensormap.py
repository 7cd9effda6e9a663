"""tensormap.replace, tensormap.cp_fenceproxy and the fences of the tensormap proxy, in PTX: which orders are right,
what misuse is called.
"""

import numpy as np
import pytest
from async_ptx import both_timings, finding, kernel, launch
from refusal import refusal

import hoppersim
from hoppersim import tensor_map


def aligned(count: int, dtype) -> np.ndarray:
    memory = np.zeros(count * np.dtype(dtype).itemsize + 128, np.uint8)
    start = -memory.ctypes.data % 128
    return memory[start : start + count * np.dtype(dtype).itemsize].view(dtype)


REPLACE = "tensormap.replace.tile.global_address.global.b1024.b64 [%a0], %a1;\n"
RELEASE = "fence.proxy.tensormap::generic.release.gpu;\n"
ACQUIRE = "fence.proxy.tensormap::generic.acquire.gpu [%a0], 128;\n"
LOAD = """mbarrier.init.shared::cta.b64 [%bar], 1;
fence.mbarrier_init.release.cluster;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 64;
cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%buffer], [%a0, {0}], [%bar];
WAIT(%bar,0)
ld.shared.b32 %r1, [%buffer];
st.global.b32 [%a2], %r1;
"""
BY_WARPS = """setp.ge.u32 %p1, %tid, 32;
@%p1 bra SECOND;
setp.ne.u32 %p2, %tid, 0;
@%p2 bra FIRST_DONE;
{first}
FIRST_DONE:
{between}
bra END;
SECOND:
{between}
setp.ne.u32 %p2, %tid, 32;
@%p2 bra END;
{second}
END:
"""


def arguments(count: int = 32):
    """A map in global memory of one tensor, another tensor, an output word."""
    old, new = aligned(count, np.uint32), aligned(count, np.uint32)
    old[...], new[...] = 1, 2
    work = aligned(128, np.uint8)
    work[...] = np.frombuffer(tensor_map.encode(old, (16,)), np.uint8)
    return [work, new, np.zeros(4, np.uint32)], old


def run(body: str, threads: int = 1, timing: str = "early", seed: int = 0) -> int:
    arrays, old = arguments()
    with hoppersim.registered(old):
        launch(kernel(body, arrays=3), arrays, threads=threads, timing=timing, seed=seed)
    return arrays[2][0]


def kind(body: str, threads: int = 1, timing: str = "early") -> str:
    arrays, old = arguments()
    with hoppersim.registered(old):
        return finding(body, arrays, threads=threads, timing=timing).kind


def by_warps(first: str, second: str, between: str = "bar.sync 0;") -> str:
    return BY_WARPS.format(first=first, second=second, between=between)


@both_timings
def test_unmodified_map_needs_no_fence(timing):
    assert run(LOAD, timing=timing) == 1


def test_a_map_lies_at_a_multiple_of_64():
    arrays, old = arguments()
    moved = aligned(144, np.uint8)
    moved[16:] = arrays[0]
    arrays[0] = moved
    with hoppersim.registered(old):
        found = finding("add.u64 %a0, %a0, 16;\n" + LOAD, arrays, threads=1)
    assert found.kind == "invalid tensor map" and "is not a multiple of 64" in str(found)


@both_timings
def test_replaced_and_fenced(timing):
    assert run(REPLACE + RELEASE + ACQUIRE + LOAD, timing=timing) == 2


@both_timings
@pytest.mark.parametrize("body, expected", [(LOAD, 1), (REPLACE + RELEASE + ACQUIRE + LOAD, 2)])
def test_the_bit_that_cute_clears_holds_nothing(body, expected, timing):
    """CuTe clears bit 21 of the second 8 bytes of a map where the driver is older than 13.2."""
    arrays, old = arguments()
    for fill in (0, 1 << 21):
        arrays[0].view(np.uint64)[1] = arrays[0].view(np.uint64)[1] & ~np.uint64(1 << 21) | np.uint64(fill)
        with hoppersim.registered(old):
            launch(kernel(body, arrays=3), arrays, threads=1, timing=timing)
        assert arrays[2][0] == expected


def test_a_written_map_without_the_bit_is_recognised():
    """Also one that ordinary stores put into memory."""
    arrays, old = arguments()
    arrays[0].view(np.uint64)[1] &= ~np.uint64(1 << 21)
    store = "".join(
        f"ld.global.v2.u64 {{%rd1, %rd2}}, [%a0+{at}];\nst.global.v2.u64 [%a0+{at}], {{%rd1, %rd2}};\n"
        for at in range(0, 128, 16)
    )
    with hoppersim.registered(old):
        assert finding(store + LOAD, arrays, threads=1).kind == "missing tensormap fence"


@both_timings
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("first, second", [(REPLACE + RELEASE, ACQUIRE + LOAD), (REPLACE + RELEASE + ACQUIRE, LOAD)])
def test_two_warps(first, second, seed, timing):
    assert run(by_warps(first, second), threads=64, timing=timing, seed=seed) == 2


@pytest.mark.parametrize(
    "body",
    [
        REPLACE + LOAD,
        REPLACE + RELEASE + LOAD,
        REPLACE + ACQUIRE + LOAD,
        ACQUIRE + REPLACE + RELEASE + LOAD,
        REPLACE + ACQUIRE + RELEASE + LOAD,
        REPLACE + RELEASE + ACQUIRE + REPLACE + LOAD,
        REPLACE + RELEASE + ACQUIRE + REPLACE + RELEASE + LOAD,
        REPLACE + RELEASE + ACQUIRE.replace("[%a0]", "[%a1]") + LOAD,
    ],
)
@both_timings
def test_missing_fence(body, timing):
    assert kind(body, timing=timing) == "missing tensormap fence"


@both_timings
def test_acquire_of_another_warp_without_a_barrier(timing):
    # The first warp comes first in the unseeded order; nothing else orders the two.
    waiting = "nanosleep.u32 100;\n" * 300
    assert (
        kind(by_warps(REPLACE + RELEASE + ACQUIRE, waiting + LOAD, between=""), threads=64, timing=timing)
        == "missing tensormap fence"
    )


@both_timings
def test_release_by_a_warp_that_does_not_know_of_the_write(timing):
    waiting = "nanosleep.u32 100;\n" * 300
    assert (
        kind(by_warps(REPLACE, waiting + RELEASE + ACQUIRE + LOAD, between=""), threads=64, timing=timing)
        == "missing tensormap fence"
    )


@pytest.mark.parametrize(
    "body, expected",
    [
        (REPLACE.replace("[%a0]", "[%a1]"), "invalid tensor map"),
        (REPLACE.replace("%a0]", "%a0+64]"), "misaligned"),
        (REPLACE.replace(", %a1", ", 8"), "invalid tensor map"),
        ("tensormap.replace.tile.rank.global.b1024.b32 [%a0], 5;", "invalid tensor map"),
        ("tensormap.replace.tile.global_stride.global.b1024.b64 [%a0], 0, 24;", "invalid tensor map"),
        (
            LOAD.replace("%a0, {0}", "%rd1, {0}")
            .replace("mbarrier.init", "cvta.shared.u64 %rd1, %rd1;\nmbarrier.init", 1)
            .replace("cvta", "cvt.u64.u32 %rd1, %buffer;\ncvta", 1),
            "invalid tensor map",
        ),
    ],
)
def test_misuse(body, expected):
    assert kind(body) == expected


@both_timings
def test_rank_counts_from_zero(timing):
    """As PTX says of this field alone."""
    body = (
        "tensormap.replace.tile.rank.global.b1024.b32 [%a0], 1;\n"
        "tensormap.replace.tile.global_stride.global.b1024.b64 [%a0], 0, 64;\n"
    )
    load = LOAD.replace(".1d.", ".2d.").replace("{0}", "{0, 0}")
    assert run(body + REPLACE + RELEASE + ACQUIRE + load, timing=timing) == 2


@pytest.mark.parametrize(
    "text",
    [
        "tensormap.replace.tile.box_dim.global.b1024.b32 [%a0], 0, 16;",
        "tensormap.replace.tile.swizzle_mode.global.b1024.b32 [%a0], 1;",
        "tensormap.replace.tile.global_dim.global.b1024.b32 [%a0], 5, 1;",
        "tensormap.replace.tile.global_stride.global.b1024.b32 [%a0], 0, 64;",
        "fence.proxy.tensormap::generic.acquire.gpu [%a0], 64;",
        "fence.proxy.tensormap::generic.acq_rel.gpu;",
        "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%a0], [%buffer], 64;",
    ],
)
def test_unsupported(text):
    found = refusal(kernel(text, arrays=1))
    assert found.kind == "unsupported instruction" and text.split()[0].rstrip(";") in str(found)
