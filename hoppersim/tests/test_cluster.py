"""Clusters: mapa, the cluster barrier, remote arrivals, copies into and between CTAs, multicast; and what their misuse
is reported as.
"""

import numpy as np
import pytest
from async_ptx import both_timings, finding, kernel, launch
from refusal import refusal

from hoppersim import tensor_map

RANK = "mov.u32 %r50, %cluster_ctarank;\nxor.b32 %r51, %r50, 1;\nsetp.eq.u32 %p5, %r50, 0;\n"
SYNC = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"
PEER = "mapa.shared::cluster.u32 %r52, %buffer, %r51;\nmapa.shared::cluster.u32 %r53, %bar, %r51;\n"
BAR = "mbarrier.init.shared::cta.b64 [%bar], 1;\nfence.mbarrier_init.release.cluster;\n"
WAIT = "WAIT(%bar,0)\n"
# out[rank * 64 + word]
OUT = "mul.lo.u32 %r60, %r50, 256;\ncvt.u64.u32 %rd60, %r60;\nadd.u64 %rd60, %a0, %rd60;\n"

seeds = pytest.mark.parametrize("seed", range(4))


def pair(body: str, out: np.ndarray, *more, **options) -> dict:
    return launch(
        kernel(RANK + PEER + OUT + body, arrays=1 + len(more), maps=options.pop("maps", 0)),
        (*options.pop("first", ()), out, *more),
        cluster=2,
        **options,
    )


@both_timings
def test_addresses(timing):
    body = """
    mapa.shared::cluster.u32 %r1, %buffer, 3;
    getctarank.shared::cluster.u32 %r2, %r1;
    cvt.u64.u32 %rd1, %buffer;
    cvta.shared.u64 %rd1, %rd1;
    mapa.u64 %rd2, %rd1, 2;
    getctarank.u32 %r3, %rd2;
    getctarank.shared::cluster.u32 %r4, %buffer;
    mov.u32 %r5, %cluster_ctarank;
    mul.lo.u32 %r6, %r5, 16;
    cvt.u64.u32 %rd3, %r6;
    add.u64 %rd3, %a0, %rd3;
    st.global.v4.u32 [%rd3], {%r2, %r3, %r4, %r5};
    """
    out = np.zeros((4, 4), np.uint32)
    launch(kernel(body), (out,), threads=1, cluster=4, timing=timing)
    assert out.tolist() == [[3, 2, rank, rank] for rank in range(4)]


@both_timings
@seeds
def test_remote_store_between_cluster_barriers(timing, seed):
    body = """
    shl.b32 %r1, %tid, 2;
    add.u32 %r2, %r52, %r1;
    add.u32 %r3, %buffer, %r1;
    mad.lo.u32 %r4, %r50, 1000, %tid;
    st.shared::cluster.u32 [%r2], %r4;
    barrier.cluster.arrive.release;
    barrier.cluster.wait.acquire;
    ld.shared.u32 %r5, [%r3];
    cvt.u64.u32 %rd1, %r1;
    add.u64 %rd1, %rd60, %rd1;
    st.global.u32 [%rd1], %r5;
    """
    out = np.zeros((2, 64), np.uint32)
    pair(body, out, threads=64, timing=timing, seed=seed)
    assert (out == np.arange(64) + np.array([[1000], [0]])).all()


@seeds
def test_lanes_that_exit_do_not_hold_up_the_cluster_barrier(seed):
    body = (
        "setp.ge.u32 %p1, %tid, 40;\n@%p1 bra END;\nbarrier.cluster.arrive.relaxed;\nbarrier.cluster.wait;\n"
        "st.global.u32 [%rd60], 1;\nEND:"
    )
    out = np.zeros((2, 64), np.uint32)
    pair(body, out, threads=64, seed=seed)
    assert out[:, 0].tolist() == [1, 1]


@both_timings
@seeds
def test_remote_arrival_with_bytes_of_a_remote_copy(timing, seed):
    """Rank 0 copies its buffer into rank 1's and arrives there with the count; rank 1 waits on its own barrier only."""
    body = f"""
    {BAR}
    st.shared.v4.u32 [%buffer], {{%r50, %r51, 7, 8}};
    fence.proxy.async;
    {SYNC}
    @!%p5 bra RECEIVER;
    mbarrier.arrive.expect_tx.release.cluster.shared::cluster.b64 _, [%r53], 16;
    add.u32 %r54, %r52, 128;
    cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r54], [%buffer], 16, [%r53];
    bra DONE;
    RECEIVER:
    {WAIT}
    ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [%buffer+128];
    st.global.v4.u32 [%rd60], {{%r1, %r2, %r3, %r4}};
    DONE:
    {SYNC}
    """.replace("{%r50, %r51, 7, 8}", "{%r50, %r51, %r50, %r51}")
    out = np.zeros((2, 64), np.uint32)
    pair("\n".join(line.strip() for line in body.splitlines()), out, threads=1, timing=timing, seed=seed)
    assert out[1, :4].tolist() == [0, 1, 0, 1]


@both_timings
@seeds
@pytest.mark.parametrize("tensor", [False, True])
def test_multicast(tensor, timing, seed):
    """Each CTA loads its half of 512 bytes into both; each expects all of them."""
    source, out = np.arange(128, dtype=np.uint32), np.zeros((2, 128), np.uint32)
    memory = np.empty(source.nbytes + 16, np.uint8)
    source = memory[-memory.ctypes.data % 16 :][: source.nbytes].view(np.uint32)
    source[:] = np.arange(128)
    if tensor:
        copy = (
            "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%r2], [%m0, {%r3}], [%bar], %h1;"
        )
    else:
        copy = (
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%r2], [%rd1], 256, [%bar], %h1;"
        )
    body = f"""
    {BAR}
    {SYNC}
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 512;
    add.u32 %r2, %buffer, %r60;
    mul.lo.u32 %r3, %r50, 64;
    add.u64 %rd1, %a1, %rd2;
    mov.u16 %h1, 3;
    {copy}
    {WAIT}
    add.u64 %rd60, %rd60, %rd2;
    cp.async.bulk.global.shared::cta.bulk_group [%rd60], [%buffer], 512;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group.read 0;
    {SYNC}
    """
    body = "cvt.u64.u32 %rd2, %r60;\n" + "\n".join(line.strip() for line in body.splitlines())
    first = (tensor_map.encode(source, (64,)),) if tensor else ()
    counters = pair(body, out, source, threads=1, timing=timing, seed=seed, maps=len(first), first=first)
    assert (out == source).all()
    assert counters["bulk_read_bytes"] == 512


@both_timings
def test_remote_reductions_share_a_destination(timing):
    """Both CTAs add 4 words to rank 0's buffer."""
    reduce = "cp.reduce.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes.add.u32"
    body = f"""
    {BAR}
    mov.u32 %r1, 5;
    st.shared.v4.u32 [%buffer], {{%r1, %r1, %r1, %r50}};
    st.shared.v4.u32 [%buffer+128], {{%r1, %r1, %r1, %r1}};
    fence.proxy.async;
    {SYNC}
    mapa.shared::cluster.u32 %r2, %buffer, 0;
    mapa.shared::cluster.u32 %r3, %bar, 0;
    @%p5 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 32;
    {reduce} [%r2], [%buffer+128], 16, [%r3];
    @!%p5 bra DONE;
    {WAIT}
    ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%buffer];
    st.global.v4.u32 [%a0], {{%r4, %r5, %r6, %r7}};
    DONE:
    {SYNC}
    """
    out = np.zeros((2, 64), np.uint32)
    pair("\n".join(line.strip() for line in body.splitlines()), out, threads=1, timing=timing)
    assert out[0, :4].tolist() == [15, 15, 15, 10]


@both_timings
@seeds
def test_st_async(timing, seed):
    body = f"""
    {BAR}
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 12;
    {SYNC}
    st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%r52], {{%r50, %r51}}, [%r53];
    st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r52+8], %r50, [%r53];
    {WAIT}
    ld.shared.v2.u32 {{%r1, %r2}}, [%buffer];
    ld.shared.u32 %r3, [%buffer+8];
    st.global.v2.u32 [%rd60], {{%r1, %r2}};
    st.global.u32 [%rd60+8], %r3;
    {SYNC}
    """
    out = np.zeros((2, 64), np.uint32)
    pair("\n".join(line.strip() for line in body.splitlines()), out, threads=1, timing=timing, seed=seed)
    assert out[:, :3].tolist() == [[1, 0, 1], [0, 1, 0]]


def test_grid_dependencies_are_met():
    out = np.zeros((2, 64), np.uint32)
    pair("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;\nst.global.u32 [%rd60], 1;", out, threads=1)
    assert out[:, 0].tolist() == [1, 1]


COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{}], [%a0], 64, [{}];"
FAULTS = {
    "no such rank": ("mapa.shared::cluster.u32 %r1, %buffer, 2;", "no such CTA"),
    "arrive twice": ("barrier.cluster.arrive.aligned;\n" * 2, "barrier.cluster misuse"),
    "wait without arrive": ("barrier.cluster.wait.aligned;", "barrier.cluster misuse"),
    "the peer waits elsewhere": (BAR + "@!%p5 bra OTHER;\n" + SYNC + "OTHER:\n" + WAIT, "dead-lock"),
    "barrier elsewhere": (BAR + SYNC + COPY.format("%r52", "%bar"), "mbarrier misuse"),
    "arrival before the cluster knows the barrier": (
        "@%p5 mbarrier.arrive.shared::cluster.b64 _, [%r53];",
        "uninitialised mbarrier",
    ),
    "multicast to nobody": (
        BAR
        + "mov.u16 %h1, 4;\n"
        + COPY.format("%buffer", "%bar").replace("bytes [", "bytes.multicast::cluster [").replace("];", "], %h1;"),
        "no such CTA",
    ),
    "local wait on a remote barrier": (BAR + SYNC + "WAIT(%r53,0)", "address of another CTA"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    body, kind = FAULTS[name]
    found = finding(RANK + PEER + body, threads=1, cluster=2)
    assert found.kind == kind, str(found)


@both_timings
def test_the_peer_may_not_leave_early(timing):
    """Without the last cluster barrier rank 1 may end before rank 0 writes to it: with this schedule it has."""
    late = (
        "@!%p5 bra END;\nmov.u32 %r1, 0;\nSPIN: add.u32 %r1, %r1, 1;\nsetp.lt.u32 %p1, %r1, 100000;\n"
        "@%p1 bra SPIN;\nmbarrier.arrive.shared::cluster.b64 _, [%r53];\nEND:"
    )
    assert (
        finding(RANK + PEER + BAR + SYNC + late, threads=1, cluster=2, timing=timing).kind == "access to an ended CTA"
    )


def test_unsupported():
    found = refusal(kernel("barrier.cluster.arrive.sideways;"))
    assert found.kind == "unsupported instruction"
