"""fence.proxy.async: after the write, and before the barrier by which the issuer knows of both. Each bug is found at
every schedule and timing, the same code made right is not reported.
"""

import re

import pytest
from async_ptx import INIT, finding
from test_races import check
from test_stages import DESCRIPTOR

FOUND = "missing proxy fence"


THIRD = "mbarrier.init.shared::cta.b64 [%bar2], 1;\nfence.mbarrier_init.release.cluster;\nREADY:"


def roles(writer: str, issuer: str, helper: str = "", *, arrivals: int = 32) -> str:
    """Warp 0 is the writer: lane n writes word n. Warp 1 is the issuer, of ``STORE`` or ``LOAD`` by its lane 0."""
    return f"""
    {INIT.replace("], 1;", f"], {arrivals};").replace("READY:", THIRD)}
    and.b32 %r1, %tid, 31;
    setp.eq.u32 %p1, %r1, 0;
    shl.b32 %r2, %r1, 2;
    add.u32 %r2, %r2, %buffer;
    cvt.u64.u32 %rd1, %r1;
    shl.b64 %rd1, %rd1, 2;
    add.u64 %rd1, %rd1, %a0;
    setp.ge.u32 %p2, %tid, 64;
    @%p2 bra HELPER;
    setp.ge.u32 %p2, %tid, 32;
    @%p2 bra ISSUER;
    {writer}
    bra END;
    HELPER:
    {helper}
    bra END;
    ISSUER:
    {issuer}
    END:
    """


WRITE = "st.shared.u32 [%r2], 5;\n"
FENCE = "fence.proxy.async.shared::cta;\n"
TOLD = "mbarrier.arrive.shared::cta.b64 _, [%bar];\n"
AGAIN = "mbarrier.arrive.shared::cta.b64 _, [%bar1];\n"
KNOWS, KNOWS_AGAIN = "WAIT(%bar,0)\n", "WAIT(%bar1,0)\n"
STORE = (
    "@%p1 cp.async.bulk.global.shared::cta.bulk_group [%a0], [%buffer], 128;\n"
    "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;\n"
)
LOAD = """
@!%p1 bra LOADED;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar2], 128;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%buffer], [%a0], 128, [%bar2];
WAIT(%bar2,0)
LOADED:
"""
ORDERS = {
    "mbarrier": (TOLD, KNOWS),
    "bar.arrive": ("bar.arrive 1, 64;\n", "bar.sync 1, 64;\n"),
    "bar.sync": ("bar.sync 1, 64;\n", "bar.sync 1, 64;\n"),
    "flag": (
        "bar.warp.sync 0xffffffff;\n@%p1 st.release.cta.shared.u32 [%buffer+1024], 1;\n",
        "SPIN: ld.acquire.cta.shared.u32 %r5, [%buffer+1024];\nsetp.eq.u32 %p3, %r5, 0;\n@%p3 bra SPIN;\n",
    ),
}
CLEAR = "st.shared.u32 [%buffer+1024], 0;\nbar.sync 0;\n"


@pytest.mark.parametrize("use", [STORE, LOAD], ids=["store", "load"])
@pytest.mark.parametrize("order", ORDERS)
def test_the_fence_comes_before_the_barrier(order, use):
    told, knows = ORDERS[order]
    legal = CLEAR + roles(WRITE + FENCE + told, knows + use)
    check(CLEAR + roles(WRITE + told + FENCE, knows + use), legal, FOUND, threads=64)
    check(CLEAR + roles(FENCE + WRITE + told, knows + use), legal, FOUND, threads=64)


def test_text_names_the_fence():
    swapped = finding(roles(WRITE + TOLD + FENCE, KNOWS + STORE), threads=64)
    text = str(swapped)
    assert swapped.kind == FOUND and "st.shared.u32 [%r2], 5" in text and "cp.async.bulk.global" in text
    assert re.search(
        r"nothing orders the fence.proxy.async after it, by CTA .*warp 0, lane 0 at ptx line \d+: fence", text
    )
    text = str(finding(roles(WRITE + TOLD, KNOWS + STORE), threads=64))
    assert "without a fence.proxy.async of that memory after it" in text


@pytest.mark.parametrize("order", ORDERS)
def test_the_issuer_fences_itself(order):
    told, knows = ORDERS[order]
    legal = CLEAR + roles(WRITE + told, knows + FENCE + STORE)
    check(CLEAR + roles(WRITE + told, FENCE + knows + STORE), legal, FOUND, threads=64)


def test_the_fence_of_another_lane_of_the_issuer():
    own, other = FENCE.replace("fence", "@%p1 fence"), FENCE.replace("fence", "@!%p1 fence")
    legal = roles(WRITE + TOLD, KNOWS + own + STORE)
    check(roles(WRITE + TOLD, KNOWS + other + STORE), legal, FOUND, threads=64)
    check(roles(WRITE + TOLD, KNOWS + other + STORE),
          roles(WRITE + TOLD, KNOWS + other + "bar.warp.sync 0xffffffff;\n" + STORE), FOUND, threads=64)  # fmt: skip


def test_a_third_warp_fences():
    """It must know of the write, and the issuer of its fence."""
    issuer = KNOWS + KNOWS_AGAIN + STORE
    legal = roles(WRITE + TOLD, issuer, KNOWS + FENCE + AGAIN)
    for helper in (KNOWS + AGAIN + FENCE, FENCE + KNOWS + AGAIN):
        check(roles(WRITE + TOLD, issuer, helper), legal, FOUND, threads=96)


def test_a_later_fence_for_other_bytes():
    writer = WRITE + "{fence}" + TOLD + "st.shared.u32 [%r2+128], 6;\n" + FENCE + AGAIN
    legal = roles(writer.format(fence=FENCE), KNOWS + STORE)
    check(roles(writer.format(fence=""), KNOWS + STORE), legal, FOUND, threads=64)
    check(roles(writer.format(fence=""), KNOWS + STORE),
          roles(writer.format(fence=""), KNOWS_AGAIN + STORE), FOUND, threads=64)  # fmt: skip


def test_many_fences_follow():
    """The issuer knows of the first of more than are told apart."""
    legal = roles(WRITE + FENCE + TOLD + 40 * FENCE + AGAIN, KNOWS_AGAIN + KNOWS + STORE)
    check(roles(WRITE + TOLD + 10 * FENCE, KNOWS + STORE), legal, FOUND, threads=64)


def test_a_lane_fences_for_the_others():
    """It must know of their writes."""
    arrive = TOLD.replace("mbarrier", "@%p1 mbarrier")
    fence = FENCE.replace("fence", "@%p1 fence")
    together = "bar.warp.sync 0xffffffff;\n"
    legal = roles(WRITE + together + fence + arrive, KNOWS + STORE, arrivals=1)
    for bug in (WRITE + fence + together + arrive, WRITE + together + arrive + fence):
        check(roles(bug, KNOWS + STORE, arrivals=1), legal, FOUND, threads=64)
    check(roles(WRITE + fence + together + arrive, KNOWS + STORE, arrivals=1),
          roles(WRITE + FENCE + together + arrive, KNOWS + STORE, arrivals=1), FOUND, threads=64)  # fmt: skip


TILE = """
setp.ge.u32 %p4, %tid, 8;
@%p4 bra END;
st.shared.u32 [%r2], 5;
{before}
bar.warp.sync 0xff;
setp.ne.u32 %p4, %tid, 3;
@%p4 bra END;
{after}
cp.async.bulk.global.shared::cta.bulk_group [%a0], [%buffer], 32;
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
"""


def test_a_tile_of_lanes():
    legal = roles(TILE.format(before="", after=FENCE), "")
    check(roles(TILE.format(before="", after=""), ""), legal, FOUND, threads=64)
    alone = "setp.eq.u32 %p4, %tid, 3;\n@%p4 fence.proxy.async;"
    check(roles(TILE.format(before=alone, after=""), ""), roles(TILE.format(before=FENCE, after=""), ""), FOUND,
          threads=64)  # fmt: skip


def test_cp_async():
    copy = "cp.async.ca.shared.global [%r2], [%rd1], 4;\n{before}cp.async.wait_all;\n{after}" + TOLD
    legal = roles(copy.format(before="", after=FENCE), KNOWS + STORE)
    check(roles(copy.format(before=FENCE, after=""), KNOWS + STORE), legal, FOUND, threads=64)
    swapped = copy.format(before="", after="") + FENCE
    check(roles(swapped, KNOWS + STORE), legal, FOUND, threads=64)


def test_global_memory():
    write, fence = "st.global.u32 [%rd1], %tid;\n", "fence.proxy.async.global;\n"
    legal = roles(write + fence + TOLD, KNOWS + LOAD)
    check(roles(write + TOLD + fence, KNOWS + LOAD), legal, FOUND, threads=64)
    check(roles(write + TOLD + fence, KNOWS + LOAD), roles(write + TOLD, KNOWS + fence + LOAD), FOUND, threads=64)


# ---- Operands of a wgmma: every warp of the warpgroup reads B
PRODUCT = """
shl.b32 %r1, %tid, 4;
add.u32 %r1, %r1, %buffer;
st.shared.v4.u32 [%r1], {{%r1, %r1, %r1, %r1}};
st.shared.v4.u32 [%r1+2048], {{%r1, %r1, %r1, %r1}};
setp.lt.u32 %p1, %tid, 32;
{before}
bar.sync 0;
{after}
shr.u32 %r3, %buffer, 4;
cvt.u64.u32 %rd10, %r3;
add.u64 %rd10, %rd10, {descriptor};
add.u64 %rd11, %rd10, 128;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f0, %f1, %f2, %f3}}, %rd10, %rd11, 1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
"""


@pytest.mark.parametrize(
    "before, after",
    [(FENCE, ""), ("", FENCE), ("", "@%p1 fence.proxy.async;\nbar.sync 0;\n")],
    ids=["before", "each warp after", "one warp after"],
)
def test_operands_of_a_wgmma(before, after):
    one = "@%p1 fence.proxy.async;\n"
    legal = PRODUCT.format(descriptor=DESCRIPTOR, before=before, after=after)
    for bug in (("", one), (one, "")):
        check(PRODUCT.format(descriptor=DESCRIPTOR, before=bug[0], after=bug[1]), legal, FOUND, threads=128)
