"""TMA + wgmma GEMMs on csrc/hopper: every swizzle and major-ness, operand A by descriptor and by registers, tails,
clusters.
"""

import time

import kernel_library
import pytest
from kernel_library import Gemm, library

SWIZZLES = (16, 32, 64, 128)  # bytes of a panel's row; 16 is the unswizzled layout
TAILS = (130, 74, 200)  # two tiles of M, a part of one in N, three and a part stages of K


def variants():
    for dtype in ("bf16", "f16"):
        for swizzle in SWIZZLES:
            for b_is_mn in (False, True):
                yield dtype, "rs", swizzle, False, b_is_mn
                yield dtype, "ss", swizzle, False, b_is_mn
                yield dtype, "ss", swizzle, True, b_is_mn


@pytest.mark.parametrize("dtype, source_of_a, swizzle, a_is_mn, b_is_mn", list(variants()))
def test_variant(dtype, source_of_a, swizzle, a_is_mn, b_is_mn):
    gemm = Gemm(*TAILS, dtype, a_is_mn, b_is_mn)
    early = gemm.variant(dtype, source_of_a, swizzle, columns=80)
    gemm.check(early)
    late = gemm.variant(dtype, source_of_a, swizzle, columns=80, timing="late", seed=7)
    assert early.tobytes() == late.tobytes()


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (128, 128, 64), (64, 8, 16), (129, 129, 65), (7, 250, 321)])
def test_sizes(m, n, k):
    gemm = Gemm(m, n, k)
    gemm.check(gemm.variant("bf16", "ss", 128, columns=n + 3))
    gemm.check(gemm.run("gemm_multicast", columns=n + 3))


@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("source", ["ss", "rs", "multicast"])
def test_schedules_agree_bitwise(source, timing):
    gemm = Gemm(140, 72, 330)
    results = set()
    for seed in range(20):
        options = {"timing": timing, "seed": seed}
        c = (
            gemm.run("gemm_multicast", **options)
            if source == "multicast"
            else gemm.variant("bf16", source, 128, **options)
        )
        results.add(c.tobytes())
    gemm.check(c)
    assert len(results) == 1


def test_multicast_equals_plain():
    gemm = Gemm(300, 136, 200)  # three tiles of M: the last cluster has a CTA with nothing in bounds
    for timing in ("early", "late"):
        assert gemm.run("gemm_multicast", timing=timing).tobytes() == gemm.variant("bf16", "ss", 128).tobytes()


def test_watchdog_of_waits_changes_nothing(monkeypatch):
    gemm = Gemm(*TAILS)
    expected = gemm.run("gemm_multicast").tobytes()
    monkeypatch.setattr(kernel_library, "library", lambda name: library(name, "-DJET_WATCHDOG"))
    for timing in ("early", "late"):
        assert gemm.run("gemm_multicast", timing=timing, seed=1).tobytes() == expected


def test_tensor_map_is_checked():
    gemm = Gemm(64, 64, 64)
    gemm.a_memory = gemm.a_memory.reshape(-1)[1:]  # 2 bytes off
    gemm.a_memory = gemm.a_memory[: 63 * 72].reshape(63, 72)
    with pytest.raises(AssertionError, match="tensor map: A address must be a multiple of 16, got"):
        gemm.variant("bf16", "ss", 128)


def test_speed():
    gemm = Gemm(256, 256, 256)
    gemm.variant("bf16", "ss", 128, host_threads=1)
    start = time.perf_counter()
    gemm.variant("bf16", "ss", 128, host_threads=1)
    assert time.perf_counter() - start < 0.5
