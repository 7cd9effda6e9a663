"""Order between the CTAs of a cluster: accesses before the end of their CTA, initialisations of mbarriers before their
use. Whether a run was lucky must not matter.
"""

import numpy as np
import pytest
from async_ptx import both_timings, kernel, launch
from test_cluster import BAR, PEER, RANK, SYNC, WAIT

import hoppersim

seeds = pytest.mark.parametrize("seed", range(10))
RELAXED = "barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"
INIT = "mbarrier.init.shared::cta.b64 [%bar], 1;\n"
FENCE = "fence.mbarrier_init.release.cluster;\n"


def run(body: str, *, threads: int = 1, cluster: int = 2, **options) -> None:
    source = np.zeros(68, np.uint32)
    source = source[-source.ctypes.data % 16 // 4 :][:64]
    launch(kernel(RANK + (PEER if cluster > 1 else "") + body), (source,), threads=threads, cluster=cluster, **options)


def kind_of(body: str, **options) -> str:
    with pytest.raises(hoppersim.Fault) as caught:
        run(body, **options)
    return caught.value.kind


# ---- Accesses before the end of their CTA: rank 0 (%p5) accesses rank 1, rank 1 does nothing

ACCESSES = {
    "ld": "@%p5 ld.shared::cluster.u32 %r1, [%r52];\n",
    "st": "@%p5 st.shared::cluster.u32 [%r52], %r50;\n",
    "ld, generic": "cvt.u64.u32 %rd1, %buffer;\ncvta.shared.u64 %rd1, %rd1;\nmapa.u64 %rd2, %rd1, 1;\n"
    "@%p5 ld.u32 %r1, [%rd2];\n",
    "atom": "@%p5 atom.shared::cluster.add.u32 %r1, [%r52], 1;\n",
    "red": "@%p5 red.shared::cluster.add.u32 [%r52], 1;\n",
    "arrive": "@%p5 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r53];\n",
    "arrive, relaxed": "@%p5 mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%r53];\n",
    "expect_tx": "@%p5 mbarrier.expect_tx.relaxed.cluster.shared::cluster.b64 [%r53], 0;\n",
}
BEGIN = "st.shared.u32 [%buffer], %r50;\n" + BAR + SYNC


@both_timings
@seeds
@pytest.mark.parametrize("access", ACCESSES)
def test_the_other_cta_may_have_ended(access, timing, seed):
    assert kind_of(BEGIN + ACCESSES[access], timing=timing, seed=seed) == "access to an ended CTA"


@both_timings
@seeds
@pytest.mark.parametrize("end", [SYNC, RELAXED])
@pytest.mark.parametrize("access", ACCESSES)
def test_a_cluster_barrier_keeps_it_alive(access, end, timing, seed):
    run(BEGIN + ACCESSES[access] + end, timing=timing, seed=seed)


@both_timings
@seeds
def test_an_arrival_without_wait_does_not(timing, seed):
    end = "barrier.cluster.arrive.release;\n@%p5 barrier.cluster.wait.acquire;\n"
    assert kind_of(BEGIN + ACCESSES["st"] + end, timing=timing, seed=seed) == "access to an ended CTA"


@both_timings
@seeds
def test_after_the_last_barrier(timing, seed):
    assert kind_of(BEGIN + SYNC + ACCESSES["ld"], timing=timing, seed=seed) == "access to an ended CTA"


@both_timings
@seeds
def test_a_barrier_that_the_other_cta_does_not_come_to(timing, seed):
    """Rank 1 ends behind the first barrier; the second is complete without it."""
    body = BEGIN + RELAXED.replace(".aligned", "") + "@!%p5 bra DONE;\n" + ACCESSES["ld"] + RELAXED + "DONE:\n"
    assert kind_of(body, timing=timing, seed=seed) == "access to an ended CTA"


@both_timings
@seeds
@pytest.mark.parametrize("arrive", ["arrive", "arrive, relaxed"])
def test_an_mbarrier_keeps_it_alive(arrive, timing, seed):
    """Rank 0 stores and arrives at rank 1, which waits for that before it ends."""
    body = BEGIN + ACCESSES["st"] + ACCESSES[arrive] + "@%p5 bra DONE;\n" + WAIT + "DONE:\n"
    run(body, timing=timing, seed=seed)
    after = BEGIN + ACCESSES[arrive] + ACCESSES["st"] + "@%p5 bra DONE;\n" + WAIT + "DONE:\n"
    assert kind_of(after, timing=timing, seed=seed) == "access to an ended CTA"


@both_timings
@seeds
def test_any_warp_of_the_cta_may_wait(timing, seed):
    """Rank 1's second warp waits for rank 0's store, its first ends at once."""
    begin = "setp.ne.u32 %p1, %tid, 0;\n@%p1 bra READY;\nst.shared.u32 [%buffer], %r50;\n" + BAR + "READY:\n" + SYNC
    wait = "setp.lt.u32 %p2, %tid, 32;\nor.pred %p3, %p5, %p2;\n@%p3 bra DONE;\n" + WAIT + "DONE:\n"
    only = "not.pred %p4, %p1;\nand.pred %p6, %p5, %p4;\n"
    store, arrive = (ACCESSES[a].replace("@%p5", "@%p6") for a in ("st", "arrive"))
    run(begin + only + store + arrive + wait, threads=64, timing=timing, seed=seed)
    assert kind_of(begin + only + arrive + store + wait, threads=64, timing=timing, seed=seed) == (
        "access to an ended CTA"
    )


COPIES = {
    "st.async": "@%p5 st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r52+128], %r50, [%r53];\n",
    "copy": "@%p5 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
    "[%r52+128], [%buffer], 16, [%r53];\n",
    "multicast": "mov.u16 %h1, 2;\n@%p5 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    ".multicast::cluster [%buffer+128], [%a0], 16, [%bar], %h1;\n",
}
FILL = "st.shared.v4.u32 [%buffer], {%r50, %r50, %r50, %r50};\nfence.proxy.async;\n"


@both_timings
@seeds
@pytest.mark.parametrize("copy", COPIES)
def test_copies_into_a_cta_that_does_not_wait(copy, timing, seed):
    bytes = 4 if copy == "st.async" else 16
    expect = f"@!%p5 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {bytes};\n"
    body = FILL + BAR + expect + SYNC + COPIES[copy]
    assert kind_of(body, timing=timing, seed=seed) == "exit with a load in flight"
    run(body + "@%p5 bra DONE;\n" + WAIT + "DONE:\n" + SYNC, timing=timing, seed=seed)


# ---- Initialisation of mbarriers

USES = {
    **{name: ACCESSES[name] for name in ("arrive", "arrive, relaxed", "expect_tx")},
    **COPIES,
}
KEEP = "@!%p5 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {};\n"


def use(name: str) -> str:
    if name not in COPIES:
        return USES[name]
    bytes = 4 if name == "st.async" else 16
    return KEEP.format(bytes) + USES[name] + "@%p5 bra DONE;\n" + WAIT + "DONE:\n"


@both_timings
@seeds
@pytest.mark.parametrize("name", USES)
def test_mbarrier_init_fence(name, timing, seed):
    """A relaxed cluster barrier orders the initialisation only with the fence before it."""
    options = {"timing": timing, "seed": seed}
    run(FILL + INIT + FENCE + RELAXED + use(name) + SYNC, **options)
    assert kind_of(FILL + INIT + RELAXED + use(name) + SYNC, **options) == "missing mbarrier_init fence"
    assert kind_of(FILL + FENCE + INIT + RELAXED + use(name) + SYNC, **options) == "missing mbarrier_init fence"


@both_timings
@seeds
def test_a_fence_after_the_arrival_is_too_late(timing, seed):
    body = INIT + RELAXED.replace("barrier.cluster.wait", FENCE + "barrier.cluster.wait") + use("arrive") + SYNC
    assert kind_of(body, timing=timing, seed=seed) == "missing mbarrier_init fence"


@both_timings
@seeds
def test_nothing_orders_the_initialisation(timing, seed):
    """Rank 0 spins: rank 1 has initialised its barrier long ago in this schedule, but nothing says so."""
    spin = "mov.u32 %r1, 0;\nSPIN: add.u32 %r1, %r1, 1;\nsetp.lt.u32 %p1, %r1, 2000;\n@%p1 bra SPIN;\n"
    body = INIT + FENCE + spin + use("arrive") + SYNC
    assert kind_of(body, timing=timing, seed=seed) == "missing mbarrier_init fence"


@both_timings
@seeds
def test_other_orders_of_the_initialisation(timing, seed):
    """Release and acquire order it for threads without the fence; a full fence makes a relaxed arrival a release."""
    options = {"timing": timing, "seed": seed}
    run(INIT + SYNC + use("arrive") + SYNC, **options)
    run(INIT + "fence.acq_rel.cluster;\n" + RELAXED + use("arrive") + SYNC, **options)
    run(FILL + INIT + "fence.proxy.async.shared::cta;\n" + SYNC + use("multicast") + SYNC, **options)


LOAD = (
    "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 16;\ncp.async.bulk.shared::cluster.global.mbarrier::"
    "complete_tx::bytes [%buffer], [%a0], 16, [%bar];\n" + WAIT
)


@both_timings
@seeds
@pytest.mark.parametrize("fence", [FENCE, "fence.proxy.async;\n", "fence.proxy.async.shared::cta;\n"])
def test_the_async_proxy_in_the_same_cta(fence, timing, seed):
    options = {"cluster": 1, "timing": timing, "seed": seed}
    run(INIT + fence + LOAD, **options)
    for bad in (INIT, fence + INIT, INIT + "fence.proxy.async.global;\n", INIT + "fence.acq_rel.gpu;\n"):
        assert kind_of(bad + LOAD, **options) == "mbarrier not fenced for the async proxy"


def test_without_the_fence_for_the_async_proxy_it_is_a_warning():
    with hoppersim.simulate():
        source = np.zeros(68, np.uint32)
        source = source[-source.ctypes.data % 16 // 4 :][:64]
        kernel(INIT + LOAD).launch("k", 1, 1, (source,))
        assert [r["severity"] for r in hoppersim.reports()] == ["warning"]


@both_timings
@seeds
def test_the_initialisation_within_a_cta(timing, seed):
    """A bar.sync is enough for the threads of the CTA."""
    options = {"cluster": 1, "threads": 64, "timing": timing, "seed": seed}
    first = "setp.ne.u32 %p1, %tid, 0;\n@%p1 bra READY;\n" + INIT + "READY:\n"
    arrive = "setp.ne.u32 %p2, %tid, 32;\n@%p2 bra DONE;\nmbarrier.arrive.shared::cta.b64 _, [%bar];\nDONE:\n"
    run(first + "bar.sync 0;\n" + arrive, **options)
    with pytest.raises(hoppersim.Fault) as caught:
        run(first + arrive, **options)
    assert caught.value.kind in ("unsynchronised shared memory", "uninitialised mbarrier")


# ---- fence.proxy.async of one space

STORE = (
    "cp.async.bulk.global.shared::cta.bulk_group [%a0], [%buffer], 16;\ncp.async.bulk.commit_group;\n"
    "cp.async.bulk.wait_group.read 0;\n"
)
WRITE = "st.shared.v4.u32 [%buffer], {%r50, %r50, %r50, %r50};\n"


@both_timings
@seeds
def test_a_proxy_fence_orders_its_space_only(timing, seed):
    options = {"cluster": 1, "timing": timing, "seed": seed}
    for space in ("", ".shared::cta", ".shared::cluster"):
        run(WRITE + f"fence.proxy.async{space};\n" + STORE, **options)
    assert kind_of(WRITE + "fence.proxy.async.global;\n" + STORE, **options) == "missing proxy fence"


@both_timings
@seeds
def test_a_proxy_fence_of_remote_memory(timing, seed):
    """Rank 0 writes to rank 1, whose copy engine reads it."""
    write = "@%p5 st.shared::cluster.v4.u32 [%r52], {%r50, %r50, %r50, %r50};\n"
    end = "@%p5 bra DONE;\n" + STORE + "DONE:\n"
    options = {"timing": timing, "seed": seed}
    for fences in (("", None), (".shared::cluster", None), (None, ".shared::cta")):
        before, after = (f"fence.proxy.async{f};\n" if f is not None else "" for f in fences)
        run(SYNC + write + before + SYNC + after + end, **options)
    body = SYNC + write + "fence.proxy.async.shared::cta;\n" + SYNC + end
    assert kind_of(body, **options) == "missing proxy fence"
