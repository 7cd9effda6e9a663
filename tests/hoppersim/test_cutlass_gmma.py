"""Each wgmma wrapper of CUTLASS's headers (cute/arch/mma_sm90_gmma*.hpp): its asm runs, and its product is NumPy's."""

import pytest
from cutlass_gmma import HEADERS, check, gmma_wrappers
from cutlass_headers import cutlass_source, wrappers

FAMILIES = sorted({w.family for w in gmma_wrappers()}) if cutlass_source() else []
REPRESENTATIVE = (8, 96, 256)  # N in which each majorness and sign is tried


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    for index, wrapper in enumerate(w for w in gmma_wrappers() if w.family == family):
        b_swizzles = (0, 64, 128) if wrapper.sparse else (0, 32, 64, 128)  # B of a sparse product has rows of 64 bytes
        whole = wrapper.n in REPRESENTATIVE
        a_majors = (0, 1) if wrapper.parameter("tnspA") and whole else (0,)
        b_majors = (0, 1) if wrapper.parameter("tnspB") and whole else (0,)
        selectors = (0, 1) if wrapper.sparse and whole and wrapper.k <= 32 else (0,)
        for number, (a_major, b_major, selector) in enumerate((a, b, s) for a in a_majors for b in b_majors for s in selectors):
            turn = index + number
            scale = ((1, 1), (-1, 1), (1, -1), (-1, -1))[turn % 4] if wrapper.parameter("scaleA") else (1, 1)
            check(
                wrapper, swizzles=((0, 32, 64, 128)[turn % 4], b_swizzles[turn % len(b_swizzles)]), trans=(a_major, b_major), scale=scale,
                selector=selector, accumulate=turn % 5 != 4, timing=("early", "late")[turn % 2],
            )  # fmt: skip


@pytest.mark.skipif(not FAMILIES, reason="needs CUTLASS's headers")
def test_every_asm_statement_is_a_known_one():
    controls = {"warpgroup_arrive", "warpgroup_wait", "warpgroup_commit_batch", "warpgroup_fence_operand"}  # in cutlass_sync.cu
    others = {f.name for f in wrappers(*HEADERS) if f.name not in controls}
    assert others == {w.name for w in gmma_wrappers()} and len(gmma_wrappers()) == sum(len(f.asm) for f in wrappers(*HEADERS) if f.name in others)
