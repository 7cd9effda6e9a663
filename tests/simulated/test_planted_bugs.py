"""Mistakes that hardware forgives on a lucky day, planted in one kernel: each must be reported as what it is, with its
place.
"""

import ctypes
import re

import numpy as np
import pytest
from kernel_library import library, random_16_bit

import hoppersim

# The order of the enumeration in planted_bugs.cu. Per variant: the kind of the Fault, what its text must contain.
BUGS = {
    "none": None,
    "missing_proxy_fence": ("missing proxy fence", "wgmma.mma_async"),
    "read_before_barrier": ("read while a copy is in flight", "wgmma.mma_async"),
    "stage_overwritten": ("overwritten while read", ""),
    "accumulator_before_wait": ("accumulator read before wait_group", ""),
    "expect_too_small": ("expect_tx too small", "cp.async.bulk.tensor"),
    "expect_too_large": ("expect_tx too large", ""),
    "wrong_parity": ("mbarrier phase skipped", "mbarrier.try_wait"),
    "out_of_bounds_shared": ("out-of-bounds shared", "st.shared"),
    "out_of_bounds_global": ("out-of-bounds global", "st.global"),
    "misaligned_bulk_copy": ("misaligned bulk copy", "cp.async.bulk"),
    "uninitialised_shared": ("uninitialised shared memory", "ld.shared"),
    "exit_in_flight": ("exit with a load in flight", "cp.async.bulk.tensor"),
    "divergent_barrier": ("divergent aligned instruction", "bar.sync"),
}
M, N, K = 64, 64, 256


def run(bug: str, **options) -> None:
    a_bits, a = random_16_bit("bf16", (M, K), seed=3)
    b_bits, b = random_16_bit("bf16", (N, K), seed=4)
    bias = np.arange(N + 4, dtype=np.float32)
    bias, c = aligned(bias), np.zeros((M, N), np.float32)
    arrays = (aligned(a_bits), aligned(b_bits), bias, c)
    message = ctypes.create_string_buffer(512)
    with hoppersim.simulate(**options):
        failed = library("planted_bugs").call("planted_bug", ctypes.c_int(list(BUGS).index(bug)), *arrays, message)
    assert failed == 0, message.value.decode()
    expected = a @ b.T + bias[:N]
    assert (abs(c - expected) <= (K + 2) * 2.0**-24 * (abs(a) @ abs(b).T + abs(expected))).all()


def aligned(array: np.ndarray) -> np.ndarray:
    memory = np.empty(array.nbytes + 16, np.uint8)
    start = -memory.ctypes.data % 16
    result = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    result[...] = array
    return result


@pytest.mark.parametrize("timing", ["early", "late"])
def test_without_a_bug(timing):
    for seed in range(5):
        run("none", timing=timing, seed=seed)


# wrong_parity: with late copies the wait returns at once and the buffer is read too early.
@pytest.mark.parametrize("timing", ["early", "late"])
@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug != "none"])
def test_bug_is_reported(bug, timing):
    kind, part = BUGS[bug]
    if bug == "wrong_parity" and timing == "late":
        kind, part = BUGS["read_before_barrier"]
    with pytest.raises(hoppersim.Fault) as caught:
        run(bug, timing=timing)
    text = str(caught.value)
    assert caught.value.kind == kind, text
    assert re.search(r"line \d+", text) and "planted" in text and part in text, text
