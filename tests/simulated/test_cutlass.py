"""GEMMs of CUTLASS's collective builders, compiled from its own headers: warp-specialised, TMA both ways, clusters of
2.
"""

import ctypes

import numpy as np
import pytest
from kernel_library import Gemm, library

import hoppersim


@pytest.mark.parametrize("schedule", ["cooperative", "pingpong"])
@pytest.mark.parametrize("m, n, k", [(256, 128, 128), (200, 72, 328)])
def test_collective_builder(schedule, m, n, k):
    gemm = Gemm(m, n, k, "f16")
    a, b = (np.ascontiguousarray(memory[:, :k]) for memory in (gemm.a_memory, gemm.b_memory))
    results = []
    for timing in ("early", "late"):
        c = np.full((m, n), np.nan, np.float32)
        sizes = (ctypes.c_int(size) for size in (m, n, k))
        with hoppersim.simulate(timing=timing):
            assert library("cutlass_gemm").call(f"cutlass_{schedule}", a, b, c, *sizes) == 0
        gemm.check(c)
        results.append(c.tobytes())
    assert results[0] == results[1]
