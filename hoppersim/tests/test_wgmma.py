"""wgmma: shared-memory layouts, register layouts, types, groups, and what must not be touched before the wait."""

import dataclasses
import time

import numpy as np
import pytest
from refusal import refusal
from wgmma_ptx import SWIZZLES, Wgmma, fragments, gather, spread, tile

import hoppersim

TIMINGS = ("early", "late")


def integers(*shape, seed=0, high=4):
    """Small integers: products and sums are exact in every type, in any order."""
    return np.random.default_rng(seed).integers(-high, high + 1, shape).astype(np.float64)


def run(kernel: Wgmma, c: np.ndarray, a: np.ndarray | None = None, threads=128, **options):
    """Launches; returns D [64, n] and the counters."""
    registers = spread(c, kernel.accumulator)
    parts = fragments(a, kernel.element) if a is not None else np.zeros(4, np.uint32)
    with hoppersim.simulate(**options):
        counters = hoppersim.Module(kernel.ptx()).launch("k", 1, threads, (kernel.image, registers, parts))
    return gather(registers, kernel.n, kernel.accumulator), counters


def simple(n=16, k=32, **changes):
    a, b, c = integers(64, k, seed=1), integers(n, k, seed=2), integers(64, n, seed=3)
    kernel = Wgmma(n, "bf16", tile(b, "bf16", 128, False), tile(a, "bf16", 128, False), **changes)
    return kernel, a, b, c


def fault_kind(kernel, c, a=None, **options) -> str:
    with pytest.raises(hoppersim.Fault) as caught:
        run(kernel, c, a, **options)
    assert "line" in str(caught.value)
    return caught.value.kind


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("n", [8, 64, 96, 128, 256])
@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_layouts(swizzle, n, timing):
    a, b, c = integers(64, 64, seed=1), integers(n, 64, seed=2), integers(64, n, seed=3)
    for a_mn in (False, True):
        for b_mn in (False, True):
            kernel = Wgmma(
                n, "bf16", tile(b, "bf16", swizzle, b_mn), tile(a, "bf16", swizzle, a_mn), trans=(int(a_mn), int(b_mn))
            )
            d, counters = run(kernel, c, timing=timing)
            np.testing.assert_array_equal(d, c + a @ b.T)
            assert counters["tensor_flop"] == 2 * 64 * n * 64


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("in_registers", [False, True])
@pytest.mark.parametrize(
    "element, accumulator",
    [
        ("f16", "f32"),
        ("f16", "f16"),
        ("bf16", "f32"),
        ("tf32", "f32"),
        ("e4m3", "f32"),
        ("e5m2", "f16"),
        ("s8", "s32"),
        ("u8", "s32"),
    ],
)
def test_types(element, accumulator, in_registers, timing):
    n, k = 48, 64
    a, b, c = integers(64, k, seed=1), integers(n, k, seed=2), integers(64, n, seed=3)
    if element == "u8":
        a, b = a % 256, b % 256
    for swizzle in SWIZZLES:
        stored = None if in_registers else tile(a, element, swizzle, False)
        kernel = Wgmma(n, element, tile(b, element, swizzle, False), stored, accumulator)
        d, _ = run(kernel, c, a if in_registers else None, timing=timing)
        np.testing.assert_array_equal(d, c + a @ b.T)


@pytest.mark.parametrize("in_registers", [False, True])
@pytest.mark.parametrize("scale", [(1, -1), (-1, 1), (-1, -1)])
def test_negation_and_scale_d(scale, in_registers):
    n, k = 24, 32
    a, b, c = integers(64, k, seed=1), integers(n, k, seed=2), integers(64, n, seed=3)
    for accumulate in (False, True):
        stored = None if in_registers else tile(a, "f16", 64, False)
        kernel = Wgmma(n, "f16", tile(b, "f16", 64, True), stored, trans=(0, 1), scale=scale, first_scale_d=accumulate)
        d, _ = run(kernel, c, a if in_registers else None)
        np.testing.assert_array_equal(d, accumulate * c + scale[0] * scale[1] * (a @ b.T))


def test_scale_d_ignores_nan():
    kernel, a, b, c = simple(first_scale_d=False)
    d, _ = run(kernel, np.full_like(c, np.nan))
    np.testing.assert_array_equal(d, a @ b.T)


@pytest.mark.parametrize("accumulator", ["f32", "f16"])
def test_accumulation_order(accumulator):
    """fp32 sums one k after another; f16 accumulators are rounded once per instruction."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((rows, 32)).astype(np.float16) for rows in (64, 32))
    c = rng.standard_normal((64, 32)).astype(np.float16)
    kernel = Wgmma(32, "f16", tile(b, "f16", 32, False), tile(a, "f16", 0, False), accumulator)
    expected = c.astype(np.float32)
    for k in range(32):
        expected += np.outer(a[:, k].astype(np.float32), b[:, k].astype(np.float32))
        if accumulator == "f16" and k % 16 == 15:
            expected = expected.astype(np.float16).astype(np.float32)
    results = [run(kernel, c, timing=timing, seed=seed)[0] for timing in TIMINGS for seed in (0, 1, 2)]
    for d in results:
        np.testing.assert_array_equal(d, expected)


def test_tf32_ignores_low_bits():
    a, b = (np.random.default_rng(s).standard_normal((rows, 8)).astype(np.float32) for s, rows in ((1, 64), (2, 8)))
    kernel = Wgmma(8, "tf32", tile(b, "tf32", 32, False), tile(a, "tf32", 32, False))
    cut = [(x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for x in (a, b)]
    d, _ = run(kernel, np.zeros((64, 8)))
    np.testing.assert_allclose(d, cut[0] @ cut[1].T, rtol=0, atol=3e-6)


# ---- Groups


@pytest.mark.parametrize("timing", TIMINGS)
def test_waits_for_all_but_the_newest_groups(timing):
    """The first group's registers are free after wait_group 1; the second group's are not."""
    kernel, a, b, c = simple(n=16)
    second = kernel.instruction(0, "%p3").replace("%d", "%e")
    second = second.replace("%e0, %e1, %e2, %e3, %e4, %e5, %e6, %e7", "%d8, %d9, %d10, %d11, %d12, %d13, %d14, %d15")
    for wanted, register in ((None, "%d0"), ("accumulator read before wait_group", "%d8")):
        kernel.extra = {
            "commit": (
                f"{second}\nwgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;\n"
                f"add.f32 %e9, {register}, {register};"
            )
        }
        if wanted:
            assert fault_kind(kernel, c, timing=timing) == wanted
        else:
            np.testing.assert_array_equal(run(kernel, c, timing=timing)[0], c + a @ b.T)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("seed", range(8))
def test_one_warps_wait_covers_the_warpgroup(timing, seed):
    """After its wait a single thread may hand the operands back: the other three warps have been read too."""
    kernel, a, b, c = simple(n=16)
    kernel.extra = {"wait": "setp.eq.u32 %p4, %r1, 0;\n@%p4 st.shared.b32 [%r2], 0;\n@%p4 st.shared.b32 [%r2+4096], 0;"}
    d, _ = run(kernel, c, timing=timing, seed=seed)
    np.testing.assert_array_equal(d, c + a @ b.T)


@pytest.mark.parametrize("timing", TIMINGS)
def test_moves_of_outstanding_accumulators_are_renamings(timing):
    kernel, a, b, c = simple(n=16)
    kernel.extra = {"between0": "mov.b32 %e0, %d0;\nmov.b32 %e1, %e0;\nmov.b32 %d0, %e1;"}
    d, _ = run(kernel, c, timing=timing)
    np.testing.assert_array_equal(d, c + a @ b.T)


# ---- Hazards


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize(
    "access", ["add.f32 %e0, %d3, %d3;", "mov.b32 %d3, 0;", "st.global.b32 [%rd4], %d3;", "mov.b64 %rd70, {%d2, %d3};"]
)
def test_accumulator_touched_before_wait(access, timing):
    kernel, _, _, c = simple(extra={"commit": access})
    assert fault_kind(kernel, c, timing=timing) == "accumulator read before wait_group"


@pytest.mark.parametrize("timing", TIMINGS)
def test_missing_wait(timing):
    kernel, _, _, c = simple(leave_out=("wait",))
    assert fault_kind(kernel, c, timing=timing) == "accumulator read before wait_group"


def test_missing_commit():
    kernel, _, _, c = simple(leave_out=("commit",))
    assert fault_kind(kernel, c) == "accumulator read before wait_group"


def test_operand_register_changed_before_wait():
    kernel, a, _, c = simple(extra={"commit": "add.s32 %a1, %a1, 1;"})
    kernel.a = None
    assert fault_kind(kernel, c, a) == "wgmma operand register touched before wait_group"


@pytest.mark.parametrize("changes", [{"leave_out": ("fence",)}, {"extra": {"fence": "add.f32 %d1, %d1, %d1;"}}])
def test_missing_wgmma_fence(changes):
    kernel, _, _, c = simple(**changes)
    assert fault_kind(kernel, c) == "missing wgmma.fence"


def test_zeroing_after_the_fence_is_the_compilers_business():
    kernel, a, b, c = simple(extra={"fence": "mov.b32 %d0, 0;"})
    run(kernel, c)


@pytest.mark.parametrize("timing", TIMINGS)
def test_operands_overwritten_while_read(timing):
    kernel, _, _, c = simple(extra={"commit": "bar.sync 0;\nst.shared.b32 [%r2], 0;"})
    assert fault_kind(kernel, c, timing=timing) == "overwritten while read"


@pytest.mark.parametrize("timing", TIMINGS)
def test_missing_proxy_fence(timing):
    kernel, _, _, c = simple(leave_out=("proxy_fence",))
    assert fault_kind(kernel, c, timing=timing) == "missing proxy fence"


def test_exit_with_wgmma_in_flight():
    kernel, _, _, c = simple(leave_out=("wait",), extra={"commit": "ret;"})
    assert fault_kind(kernel, c) == "exit with wgmma in flight"


def test_incomplete_warpgroup():
    kernel, _, _, c = simple()
    assert fault_kind(kernel, c, threads=96) == "incomplete warpgroup"


def test_descriptor_with_base_offset_is_not_modelled():
    kernel, _, _, c = simple()
    kernel.b.constants |= 1 << 49
    assert fault_kind(kernel, c) == "unsupported instruction"


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_a_tile_starts_where_its_swizzle_does(swizzle):
    """Not a row, nor half of the rows, further."""
    a, b, c = integers(64, 32, seed=1), integers(16, 32, seed=2), integers(64, 16, seed=3)
    right = tile(b, "bf16", swizzle, False)
    run(Wgmma(16, "bf16", right, tile(a, "bf16", swizzle, False)), c)
    for bytes_off in {128, 4 * swizzle}:
        moved = dataclasses.replace(right, starts=[start + bytes_off for start in right.starts])
        assert (
            fault_kind(Wgmma(16, "bf16", moved, tile(a, "bf16", swizzle, False)), c) == "misaligned matrix descriptor"
        )


def test_operands_differ_within_the_warpgroup():
    kernel, _, _, c = simple(extra={"fence": "setp.lt.u32 %p4, %r1, 32;\n@%p4 add.s64 %rd40, %rd40, 1;"})
    assert fault_kind(kernel, c) == "wgmma differs within the warpgroup"


@pytest.mark.parametrize(
    "types", ["f16.tf32.tf32", "s32.s4.s4", "f32.b1.b1", "f16.bf16.bf16", "f32.bf16.f16", "f32.f16.e4m3"]
)
def test_unsupported_types(types):
    kernel, _, _, _ = simple()
    found = refusal(kernel.ptx().replace("f32.bf16.bf16", types))
    assert found.kind == "unsupported instruction" and "wgmma.mma_async" in str(found)


def test_speed():
    """The wgmma work of a 256x256x256 product in well under half a second."""
    kernel, a, b, c = simple(n=256, k=64)
    module = hoppersim.Module(kernel.ptx())
    image, registers = kernel.image, np.zeros((16, 128, kernel.registers), np.uint32)
    begin = time.perf_counter()
    with hoppersim.simulate(host_threads=1):
        for part in registers:  # 16 launches of 64 x 256 x 64
            module.launch("k", 1, 128, (image, part, np.zeros(4, np.uint32)))
    assert time.perf_counter() - begin < 0.5
    np.testing.assert_array_equal(gather(registers[0], 256, "f32"), a @ b.T)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("seed", range(4))
def test_operands_overwritten_after_the_wait(timing, seed):
    kernel, a, b, c = simple(extra={"wait": "bar.sync 0;\nst.shared.b32 [%r2], 0;"})
    np.testing.assert_array_equal(run(kernel, c, timing=timing, seed=seed)[0], c + a @ b.T)
