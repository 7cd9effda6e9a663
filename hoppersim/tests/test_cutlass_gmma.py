"""Each wgmma wrapper of CUTLASS's headers (cute/arch/mma_sm90_gmma*.hpp): its asm runs, and its product is NumPy's."""

import ctypes

import numpy as np
import pytest
from cutlass_gmma import HEADERS, gmma_wrappers, problem, run
from cutlass_headers import cutlass_source, wrappers
from cutlass_kernels import library
from refusal import refusal

import hoppersim

FAMILIES = sorted({w.family for w in gmma_wrappers()}) if cutlass_source() else []
REPRESENTATIVE = (8, 96, 256)  # N in which each majorness and selector is tried
CONTROLS = {
    "warpgroup_arrive",
    "warpgroup_wait",
    "warpgroup_commit_batch",
    "warpgroup_fence_operand",
}  # in kernels/wrappers_mma.cu
TIMINGS = ("early", "late")

needs_cutlass = pytest.mark.skipif(not FAMILIES, reason="needs CUTLASS's headers")


def named(name: str):
    return next(w for w in gmma_wrappers() if w.name == f"{name}::fma")


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    for index, wrapper in enumerate(w for w in gmma_wrappers() if w.family == family):
        b_swizzles = (0, 64, 128) if wrapper.sparse else (0, 32, 64, 128)  # B of a sparse product has rows of 64 bytes
        whole = wrapper.n in REPRESENTATIVE
        a_majors = (0, 1) if wrapper.parameter("tnspA") and whole else (0,)
        b_majors = (0, 1) if wrapper.parameter("tnspB") and whole else (0,)
        selectors = (0, 1) if wrapper.sparse and whole and wrapper.k <= 32 else (0,)
        for number, (a_major, b_major, selector) in enumerate(
            (a, b, s) for a in a_majors for b in b_majors for s in selectors
        ):
            turn = index + number
            scale = ((1, 1), (-1, 1), (1, -1), (-1, -1))[turn % 4] if wrapper.parameter("scaleA") else (1, 1)
            p = problem(
                wrapper,
                swizzles=((0, 32, 64, 128)[turn % 4], b_swizzles[turn % len(b_swizzles)]),
                trans=(a_major, b_major),
                scale=scale,
                selector=selector,
                accumulate=turn % 5 != 4,
            )
            counters = run(p, timing=TIMINGS[turn % 2])
            p.check()
            assert counters["tensor_flop"] == 2 * 64 * wrapper.n * wrapper.k


@needs_cutlass
def test_every_asm_statement_is_a_known_one():
    others = [f for f in wrappers(*HEADERS) if f.name not in CONTROLS]
    assert {f.name for f in others} == {w.name for w in gmma_wrappers()}
    assert len(gmma_wrappers()) == sum(len(f.asm) for f in others)


COMPILED = [  # in the order of run_wgmma_product
    "MMA_64x32x32_F32E4M3E5M2_SS_TN",
    "MMA_64x32x32_S32U8S8_RS_TN_SATURATE",
    "GMMA_64x32x64_F32E5M2E4M3_SS_TN",
    "GMMA_64x32x32_F32BF16BF16_RS",
]


@needs_cutlass
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("which", range(4))
def test_compiled(which, timing):
    """The same through nvcc: the wrapper called from C++."""
    p = problem(named(COMPILED[which]))
    kernel, image = p.kernel, p.kernel.image
    begin_b = len(image) - len(kernel.b.image)
    desc_a = 0 if kernel.a is None else kernel.a.constants
    descriptors = [ctypes.c_uint64(d) for d in (desc_a, kernel.b.constants + (begin_b >> 4))]
    with hoppersim.simulate(timing=timing):
        assert (
            library("wrappers_mma").call(
                "run_wgmma_product", which, image, len(image), *descriptors, p.registers, p.fragments
            )
            == 0
        )
    p.check()


# ---- Hazards: the rules of the dense 16-bit products hold for all kinds
KINDS = [
    "MMA_64x32x32_F32E4M3E5M2_RS_TN",
    "MMA_64x32x32_S32S8U8_RS_TN",
    "GMMA_64x32x32_F16F16F16_RS",
    "GMMA_64x32x64_F32E4M3E4M3_RS_TN",
]
BUGS = {
    "accumulator read before wait_group": {"extra": {"commit": "add.u32 %d0, %d0, 1;"}},
    "wgmma operand register touched before wait_group": {"extra": {"commit": "add.u32 %a0, %a1, 1;"}},
    "missing wgmma.fence": {"leave_out": ("fence",)},
    "missing proxy fence": {"leave_out": ("proxy_fence",)},
    "overwritten while read": {"extra": {"commit": "bar.sync 0;\nst.shared.b32 [%r2], 0;"}},
    "exit with wgmma in flight": {"leave_out": ("wait",), "extra": {"commit": "ret;"}},
}


def fault_kind(p, **simulate) -> str:
    with pytest.raises(hoppersim.Fault) as caught:
        run(p, **simulate)
    assert "wgmma" in str(caught.value) or "line" in str(caught.value)
    return caught.value.kind


@needs_cutlass
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("name", KINDS)
def test_hazards(name, bug, timing):
    assert fault_kind(problem(named(name), **BUGS[bug]), timing=timing) == bug


@needs_cutlass
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize(
    "name, nibble",
    [
        ("GMMA_64x32x32_F16F16F16_RS", 0b0101),
        ("GMMA_64x32x32_F16F16F16_RS", 0b0001),
        ("GMMA_64x32x64_F32E4M3E4M3_RS_TN", 0b1111),
        ("GMMA_64x32x16_F32TF32TF32_RS_TN", 0b1001),
        ("GMMA_64x32x16_F32TF32TF32_RS_TN", 0b0000),
    ],
)
def test_invalid_metadata(name, nibble, timing):
    p = problem(named(name))
    p.fragments[64, -1] = p.fragments[64, -1] & np.uint32(0xFFFFFF0F) | np.uint32(nibble << 4)
    assert fault_kind(p, timing=timing) == "invalid sparsity metadata"


@needs_cutlass
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize(
    "place, text, kind",
    [
        ("commit", "mov.u32 %e0, 0;", "wgmma operand register touched before wait_group"),
        ("fence", "add.u32 %e0, %e0, 0;", "missing wgmma.fence"),
    ],
)
@pytest.mark.parametrize("name", ["GMMA_64x32x32_F16F16F16_RS", "GMMA_64x32x64_S32S8S8_SS_TN"])
def test_metadata_register(name, place, text, kind, timing):
    assert fault_kind(problem(named(name), extra={place: text}), timing=timing) == kind


@needs_cutlass
@pytest.mark.parametrize("name", ["MMA_64x32x32_S32S8U8_RS_TN_SATURATE", "GMMA_64x32x64_S32S8U8_SS_TN_SATURATE"])
def test_satfinite_where_ptx_has_it(name):
    """PTX's grammar has it before the types, CUTLASS after them; ptxas takes both."""
    p = problem(named(name))
    text = p.kernel.ptx().replace(".s32.s8.u8.satfinite", ".satfinite.s32.s8.u8")
    with hoppersim.simulate():
        hoppersim.Module(text).launch("k", 1, 128, (p.kernel.image, p.registers, p.fragments))
    p.check()


@needs_cutlass
def test_sparse_b_in_a_short_swizzle_is_not_modelled():
    assert fault_kind(problem(named("GMMA_64x32x32_F16F16F16_RS"), swizzles=(128, 32))) == "unsupported instruction"


@needs_cutlass
@pytest.mark.parametrize(
    "change", [(", 0,", ", 2,"), ("m64n32k32", "m64n40k32"), (".f16.f16.f16", ".f16.bf16.bf16"), ("k32", "k16")]
)
def test_malformed(change):
    p = problem(named("GMMA_64x32x32_F16F16F16_RS"))
    text = p.kernel.ptx()
    line = next(line for line in text.splitlines() if "mma_async" in line)
    changed = text.replace("%e0, 0,", "%e0, 2,") if change[0] == ", 0," else text.replace(line, line.replace(*change))
    assert refusal(changed).kind == "unsupported instruction"


@needs_cutlass
@pytest.mark.parametrize(
    "name, of_b",
    [
        ("MMA_64x32x32_F32E4M3E5M2_SS_TN", 2),
        ("MMA_64x32x32_F32E4M3E5M2_RS_TN", 2),
        ("GMMA_64x32x64_F32E5M2E4M3_SS_TN", 4),
    ],
)
def test_operand_wavefronts(name, of_b):
    """A core matrix of 8 rows of 16 bytes is a wavefront; B is read once for the warpgroup."""
    of_a = 0 if "_RS" in name else 64 // 8 * 2
    assert run(problem(named(name)))["wgmma_wavefronts"] == of_a + 32 // 8 * of_b
