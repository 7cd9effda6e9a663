"""What a bulk store writes to global memory, until its lane has waited for its group: at each schedule and timing."""

import numpy as np
import pytest
from async_ptx import INIT, kernel, launch
from test_races import SEEDS

import hoppersim

# Thread 0 of each CTA fills 256 bytes in shared memory and stores them to its part of the first KiB of %a0.
STORE = (
    INIT
    + """
mov.u32 %r1, %ctaid.x;
shl.b32 %r2, %r1, 8;
cvt.u64.u32 %rd1, %r2;
add.u64 %rd1, %rd1, %a0;
shl.b32 %r3, %tid, 2;
add.u32 %r4, %r3, %buffer;
st.shared.u32 [%r4], 7;
fence.proxy.async.shared::cta;
bar.sync 0;
setp.ne.u32 %p1, %tid, 0;
@%p1 bra STORED;
cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%buffer], 256;
cp.async.bulk.commit_group;
{wait}
STORED:
bar.sync 0;
{then}
@!%p1 cp.async.bulk.wait_group 0;
"""
)
WAIT, READ_WAIT = "cp.async.bulk.wait_group 0;", "cp.async.bulk.wait_group.read 0;"
OWN = "cvt.u64.u32 %rd2, %r3;\nadd.u64 %rd2, %rd2, %rd1;\n"
THEN = {
    "read": OWN + "ld.global.u32 %r5, [%rd2];",
    "written": OWN + "st.global.u32 [%rd2], 9;",
    "stored": "@!%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%buffer], 256;\n"
    "@!%p1 cp.async.bulk.commit_group;",
    "loaded": "@!%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 256;\n@!%p1 cp.async.bulk.shared::cluster."
    "global.mbarrier::complete_tx::bytes [%buffer+1024], [%rd1], 256, [%bar];\nWAIT(%bar,0)",
}
# CTA 1 reads what CTA 0 has stored.
FLAG = """
setp.ne.u32 %p2, %r1, 0;
@%p2 bra OTHER;
@!%p1 st.release.gpu.global.u32 [%a0+2048], 1;
bra END;
OTHER:
@%p1 bra SEEN;
SPIN: ld.acquire.gpu.global.u32 %r5, [%a0+2048];
setp.eq.u32 %p3, %r5, 0;
@%p3 bra SPIN;
SEEN: bar.sync 1;
cvt.u64.u32 %rd2, %r3;
add.u64 %rd2, %rd2, %a0;
ld.global.u32 %r5, [%rd2];
END:
"""


def kinds(body: str, grid: int) -> set:
    module, found = kernel(body), set()
    for timing in ("early", "late"):
        for seed in SEEDS:
            try:
                with hoppersim.simulate(timing=timing, seed=seed, strict=True):
                    module.launch("k", grid, 64, (np.zeros(1024, np.uint32),))
                found.add(None)
            except hoppersim.Fault as fault:
                found.add(fault.kind)
    return found


@pytest.mark.parametrize("grid", [1, 3])
@pytest.mark.parametrize("then", THEN)
def test_bytes_of_a_store_that_only_its_source_was_waited_for(then, grid):
    assert kinds(STORE.format(wait=WAIT, then=THEN[then]), grid) == {None}
    assert kinds(STORE.format(wait=READ_WAIT, then=THEN[then]), grid) == {"race in global memory"}


def test_a_flag_after_a_store():
    assert kinds(STORE.format(wait=WAIT, then=FLAG), 2) == {None}
    assert kinds(STORE.format(wait=READ_WAIT, then=FLAG), 2) == {"race in global memory"}


def test_the_text_names_the_store():
    with pytest.raises(hoppersim.Fault) as caught:
        launch(kernel(STORE.format(wait=READ_WAIT, then=THEN["read"])), (np.zeros(1024, np.uint32),), threads=64)
    text = str(caught.value)
    assert "is being written by CTA (0, 0, 0) at ptx line" in text and "cp.async.bulk.global" in text
    assert "has not waited for its group (wait_group without .read)" in text


# CTA 0 reads 256 bytes by ld.global.nc and its last CTA writes some, in either order.
READ_ONLY = """
shl.b32 %r2, %tid, 2;
cvt.u64.u32 %rd1, %r2;
add.u64 %rd1, %rd1, %a0;
mov.u32 %r1, %ctaid.x;
mov.u32 %r3, %nctaid.x;
add.u32 %r3, %r3, -1;
setp.ne.u32 %p1, %r1, 0;
setp.ne.u32 %p2, %r1, %r3;
{0}
{1}
"""
NC, PUT = "@!%p1 {}.u32 %r5, [%rd1];", "@!%p2 st.global.u32 [%rd1+{}], 9;"


@pytest.mark.parametrize("grid", [1, 2, 5])
@pytest.mark.parametrize("order", [1, -1])
def test_read_only_memory_is_not_written(grid, order):
    def body(load: str, to: int) -> str:
        return READ_ONLY.format(*[NC.format(load), PUT.format(to)][::order])

    assert kinds(body("ld.global.nc", 1024), grid) == {None}
    assert kinds(body("ld.global.nc", 0), grid) == {"read-only memory written"}
    assert kinds(body("ld.global", 0), 1) == {None}
