"""Copies and st.async between the CTAs of a cluster: their sources, destinations, and the exit of the source. Each bug
is found in each schedule and timing, the same code made right is not reported.
"""

import numpy as np
import pytest
from async_ptx import finding
from test_cluster import PEER, RANK, SYNC
from test_races import check, outcomes

# Rank 0 (%p5) sends 1 KiB at [%buffer] to [%buffer+1024] of rank 1, each thread 16 bytes of them; rank 1 waits at
# [%bar]. [%bar1] of rank 0 takes rank 1's answer. Two warps each; every thread of rank 1 waits.
THREADS = 64
HEAD = (
    RANK
    + PEER
    + """
mapa.shared::cluster.u32 %r54, %bar1, %r51;
shl.b32 %r1, %tid, 4;
add.u32 %r2, %buffer, %r1;
add.u32 %r3, %r2, 1024;
xor.b32 %r4, %r3, 0x210;
add.u32 %r5, %r52, %r1;
add.u32 %r5, %r5, 1024;
setp.eq.u32 %p1, %tid, 0;
setp.ne.u32 %p2, %tid, 0;
"""
)
SETUP = """
@%p2 bra READY;
mbarrier.init.shared::cta.b64 [%bar], 1;
mbarrier.init.shared::cta.b64 [%bar1], 64;
fence.mbarrier_init.release.cluster;
@!%p5 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 1024;
READY:
"""
SPLIT = "@!%p5 bra RECEIVER;\n"
SEND = {
    "st.async": "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%r5], {%r1, %r1, %r1, %r1}, [%r53];\n",
    "copy": "bar.sync 0;\nadd.u32 %r6, %r52, 1024;\n@%p1 cp.async.bulk.shared::cluster.shared::cta.mbarrier::"
    "complete_tx::bytes [%r6], [%buffer], 1024, [%r53];\n",
}
FILL, FENCE = "st.shared.v4.u32 [%r2], {%r1, %r1, %r1, %r1};\n", "fence.proxy.async;\n"
WAIT, READ = "WAIT(%bar,0)\n", "ld.shared.v4.u32 {%r7, %r8, %r9, %r10}, [%r4];\n"
ANSWER, ANSWERED = "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r54];\n", "WAIT(%bar1,0)\n"
WRITE = "st.shared.v4.u32 [%r3], {%r1, %r1, %r1, %r1};\n"
sends = pytest.mark.parametrize("send", SEND)
FOUND = "race in shared memory", "read while a copy is in flight", "overwritten while a copy is in flight"


def sent(sender: str, receiver: str, *, before: str = "", end: str = SYNC) -> str:
    """`before`: of all, before the cluster barrier that lets rank 0 send; `end`: of all."""
    body = [HEAD, SETUP, FILL, FENCE, before, SYNC, SPLIT, sender, "bra DONE;\nRECEIVER:\n", receiver, "DONE:\n", end]
    return "".join(body)


def checked(bug: str, legal: str, *kinds: str) -> None:
    check(bug, legal, *kinds, threads=THREADS, cluster=2)


# ---- The destination


@sends
def test_destination_read_without_a_wait(send):
    kinds = *FOUND, "uninitialised shared memory"
    checked(sent(SEND[send], READ + WAIT), sent(SEND[send], WAIT + READ), *kinds)


@sends
def test_one_warp_of_the_target_waits_for_the_other(send):
    one = "setp.ge.u32 %p3, %tid, 32;\n@%p3 bra WAITED;\n" + WAIT + "WAITED:\n"
    checked(
        sent(SEND[send], one + READ + WAIT),
        sent(SEND[send], one + "bar.sync 0;\n" + READ),
        *FOUND,
        "uninitialised shared memory",
    )


@sends
def test_destination_is_still_read_by_its_cta(send):
    """Rank 1 reads what it wrote itself; the cluster barrier lets rank 0 send."""
    write = WRITE + FENCE + "bar.sync 0;\n"
    legal = sent(SEND[send], WAIT, before=write + READ)
    bug = sent(SEND[send], READ + WAIT, before=write)
    checked(bug, legal, *FOUND)


@sends
def test_destination_is_still_written_by_its_cta(send):
    legal = sent(SEND[send], WAIT + READ, before=WRITE + FENCE)
    bug = sent(SEND[send], WRITE + WAIT + READ)
    checked(bug, legal, *FOUND, "unsynchronised shared memory", "missing proxy fence")


@sends
def test_destination_is_written_again_before_the_copy_is_waited_for(send):
    checked(sent(SEND[send], WRITE + WAIT), sent(SEND[send], WAIT + WRITE), *FOUND, "unsynchronised shared memory")


def test_a_copy_over_what_a_thread_wrote_needs_the_proxy_fence():
    legal = sent(SEND["copy"], WAIT, before=WRITE + FENCE)
    checked(sent(SEND["copy"], WAIT, before=WRITE), legal, "missing proxy fence")


def test_st_async_needs_none():
    """It is not said to be of the async proxy: in doubt nothing is reported."""
    assert outcomes(sent(SEND["st.async"], WAIT, before=WRITE), threads=THREADS, cluster=2) == {None}


@sends
def test_two_sends_to_the_same_bytes(send):
    """The second may come when rank 1 has answered that the first has arrived."""
    again = SEND[send]
    answer = WAIT + "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 1024;\n" + ANSWER + "WAIT(%bar,1)\n"
    legal = sent(SEND[send] + ANSWERED + again, answer)
    bug = sent(SEND[send] + again, WAIT).replace("_, [%bar], 1024", "_, [%bar], 2048")
    checked(bug, legal, *FOUND)


def test_two_ctas_send_to_the_same_bytes():
    """Both to rank 0, each by its own words or all by the same."""
    body = (
        HEAD
        + SETUP.replace("@!%p5 mbar", "@%p5 mbar")
        + SYNC
        + """
    mapa.shared::cluster.u32 %r7, %buffer, 0;
    mapa.shared::cluster.u32 %r8, %bar, 0;
    add.u32 %r7, %r7, %r1;
    mad.lo.u32 %r7, %r50, {apart}, %r7;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [%r7], %rd1, [%r8];
    @!%p5 bra DONE;
    WAIT(%bar,0)
    DONE:
    """
        + SYNC
    )
    checked(body.format(apart=0), body.format(apart=8), *FOUND)


# ---- The source


def test_source_written_without_a_proxy_fence():
    legal = sent(SEND["copy"], WAIT)
    checked(legal.replace(FENCE, ""), legal, "missing proxy fence")


def test_source_is_written_again_before_the_copy_is_done():
    legal = sent(SEND["copy"] + ANSWERED + FILL, WAIT + ANSWER)
    # the other warp may write before the copy is issued
    kinds = "race in shared memory", "overwritten while read", "unsynchronised shared memory"
    checked(sent(SEND["copy"] + FILL, WAIT + ANSWER), legal, *kinds)
    checked(sent(SEND["copy"] + ANSWERED + FILL, ANSWER + WAIT), legal, *kinds)


def test_source_is_written_by_the_next_load():
    load = (
        "@%p2 bra DONE;\nmbarrier.init.shared::cta.b64 [%bar2], 1;\nfence.mbarrier_init.release.cluster;\n"
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar2], 512;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%buffer], [%a0], 512, [%bar2];\n"
        "WAIT(%bar2,0)\n"
    )
    legal = sent(SEND["copy"] + ANSWERED + load, WAIT + ANSWER)
    checked(sent(SEND["copy"] + load, WAIT + ANSWER), legal, "race in shared memory", "overwritten while read")


def test_source_read_by_its_cta_meanwhile():
    """Two reads."""
    read = "ld.shared.u32 %r7, [%r2];\n"
    assert outcomes(sent(SEND["copy"] + read, WAIT), threads=THREADS, cluster=2) == {None}


# ---- The end of the source's CTA


@pytest.mark.parametrize("relaxed", [False, True])
def test_the_source_cta_may_not_end_before_the_copy_is_done(relaxed):
    end = SYNC.replace("release", "relaxed") if relaxed else SYNC
    answer = ANSWER.replace("release", "relaxed") if relaxed else ANSWER
    legal = sent(SEND["copy"], WAIT, end=end), sent(SEND["copy"] + ANSWERED, WAIT + answer, end="")
    early = "barrier.cluster.arrive.release;\n" + WAIT + "barrier.cluster.wait.acquire;\nbra OUT;\n"
    bugs = (
        sent(SEND["copy"], WAIT, end=""),
        sent(SEND["copy"], early, end=end + "OUT:\n"),  # rank 1 comes to the barrier before it has waited
        sent(SEND["copy"] + ANSWERED, answer + WAIT, end=""),
    )
    for right in legal:
        for bug in bugs:
            checked(bug, right, "access to an ended CTA")


def test_any_warp_of_the_source_cta_may_wait():
    one = "setp.lt.u32 %p3, %tid, 32;\n@%p3 bra DONE;\n" + ANSWERED
    legal = sent(SEND["copy"] + one, WAIT + ANSWER, end="")
    checked(sent(SEND["copy"] + one.replace(ANSWERED, ""), WAIT + ANSWER, end=""), legal, "access to an ended CTA")


def test_st_async_has_no_source_in_memory():
    assert outcomes(sent(SEND["st.async"], WAIT, end=""), threads=THREADS, cluster=2) == {None}


def test_the_text_names_the_copy():
    found = str(finding(sent(SEND["copy"], WAIT, end=""), (np.zeros(64, np.uint32),), threads=THREADS, cluster=2))
    assert "rank 0" in found and "cp.async.bulk.shared::cluster.shared::cta" in found, found
