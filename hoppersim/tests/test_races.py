"""Races: each planted one is found at every schedule and timing, and the same code made right is not reported."""

import re

import numpy as np
import pytest
from async_ptx import INIT, kernel, launch

import hoppersim

SEEDS = range(10)
BAR = "bar.sync 0;"


def outcomes(body: str, *, threads: int = 64, cluster: int = 1, args=None, **options) -> set:
    """The kinds of the Faults of all seeds and both timings; None: no Fault."""
    module = kernel(body, arrays=1 if args is None else len(args), **options)
    kinds = set()
    for timing in ("early", "late"):
        for seed in SEEDS:
            try:
                arrays = (np.zeros(4096, np.uint32),) if args is None else args
                launch(module, arrays, threads=threads, cluster=cluster, timing=timing, seed=seed)
                kinds.add(None)
            except hoppersim.Fault as fault:
                kinds.add(fault.kind)
                if "race" in fault.kind:
                    assert "ptx line" in str(fault) and "lane" in str(fault), str(fault)
    return kinds


def check(bug: str, legal: str, *kinds: str, **options) -> None:
    assert outcomes(legal, **options) == {None}
    found = outcomes(bug, **options)
    assert found and found <= set(kinds), found


def between(*, first: str, order: str, second: str) -> str:
    """Warp 0 does `first`, warp 1 `second`; `order` lies between for both. The buffer is written before."""
    return f"""
    shl.b32 %r1, %tid, 2;
    and.b32 %r2, %tid, 31;
    shl.b32 %r3, %r2, 2;
    add.u32 %r3, %r3, %buffer;
    add.u32 %r1, %r1, %buffer;
    st.shared.u32 [%r1], %tid;
    bar.sync 0;
    setp.ge.u32 %p1, %tid, 32;
    @%p1 bra SECOND;
    {first}
    {order}
    bra END;
    SECOND:
    {order}
    {second}
    END:
    """


WRITE, READ = "st.shared.u32 [%r3], %tid;", "ld.shared.u32 %r4, [%r3];"


@pytest.mark.parametrize("first, second", [(WRITE, READ), (READ, WRITE), (WRITE, WRITE)], ids=["raw", "war", "waw"])
@pytest.mark.parametrize(
    "order", [BAR, "bar.sync 3, 64;", "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;"]
)
def test_between_warps(first, second, order):
    check(between(first=first, order="", second=second), between(first=first, order=order, second=second),
          "race in shared memory")  # fmt: skip


def test_other_barriers_do_not_order():
    apart = between(first=WRITE + "bar.sync 1, 32;", order="", second="bar.sync 2, 32;" + READ)
    arrives = between(first=WRITE + "bar.arrive 1, 64;", order="", second="bar.sync 1, 64;" + READ)
    too_early = between(first="bar.arrive 1, 64;" + WRITE, order="", second="bar.sync 1, 64;" + READ)
    check(apart, arrives, "race in shared memory")
    check(too_early, arrives, "race in shared memory")


def test_neighbouring_bytes_are_no_race():
    halves = between(
        first="st.shared.b16 [%r3], 1;", order="", second="st.shared.b16 [%r3+2], 2;\nld.shared.b16 %h1, [%r3+2];"
    )
    overlap = between(
        first="st.shared.b16 [%r3], 1;", order="", second="st.shared.b16 [%r3+2], 2;\nld.shared.u32 %r4, [%r3];"
    )
    check(overlap, halves, "race in shared memory")


def test_the_same_value_twice_is_no_race():
    same = between(first="st.shared.u32 [%buffer], 7;", order="", second="st.shared.u32 [%buffer], 7;")
    other = between(first="st.shared.u32 [%buffer], 7;", order="", second="st.shared.u32 [%buffer], 8;")
    check(other, same, "race in shared memory")


def test_text_names_both_accesses():
    with pytest.raises(hoppersim.Fault) as caught:
        launch(kernel(between(first=WRITE, order="", second=READ)), (np.zeros(64, np.uint32),), threads=64)
    text = str(caught.value)
    assert re.search(r"by CTA .*warp [01], lane 0 at ptx line \d+.*warp [01], lane 0$", text) and "ld.shared" in text, (
        text
    )
    assert "st.shared.u32 [%r3], %tid" in text and "a barrier" in text


FLAG = """
SPIN: {load} %r5, [%buffer+1024];
setp.eq.u32 %p2, %r5, 0;
@%p2 bra SPIN;
"""


RELAXED = {
    "volatile": ("membar.cta;\n", "st.volatile.shared.u32 [%buffer+1024], 1;\n", "ld.volatile.shared.u32",
                 "membar.cta;\n"),
    "relaxed": ("fence.acq_rel.cta;\n", "st.relaxed.cta.shared.u32 [%buffer+1024], 1;\n", "ld.relaxed.cta.shared.u32",
                "fence.acq_rel.cta;\n"),
    "atom": ("fence.acq_rel.cta;\n", "atom.shared.exch.b32 %r6, [%buffer+1024], 1;\n", "ld.volatile.shared.u32",
             "fence.acq_rel.cta;\n"),
    "bar": ("bar.sync 2, 32;\n", "st.volatile.shared.u32 [%buffer+1024], 1;\n", "ld.volatile.shared.u32",
            "bar.sync 3, 32;\n"),
    "released, fenced": ("", "st.release.cta.shared.u32 [%buffer+1024], 1;\n", "ld.relaxed.cta.shared.u32",
                         "fence.acq_rel.cta;\n"),
    "fenced, acquired": ("fence.acq_rel.cta;\n", "red.shared.add.u32 [%buffer+1024], 1;\n",
                         "ld.acquire.cta.shared.u32", ""),
    "release and acquire": ("", "st.release.cta.shared.u32 [%buffer+1024], 1;\n", "ld.acquire.cta.shared.u32", ""),
    "atomics": ("", "atom.release.cta.shared.exch.b32 %r6, [%buffer+1024], 1;\n",
                "atom.acquire.cta.shared.add.u32", ""),
}  # fmt: skip


@pytest.mark.parametrize("access", RELAXED)
def test_flags_order(access):
    """A relaxed access orders what a fence or barrier has released before it, for a fence or barrier after it."""
    before, store, load, after = RELAXED[access]

    def flagged(before: str, after: str, write: str = WRITE + "bar.warp.sync 0xffffffff;\n", late: str = "") -> str:
        head = "setp.eq.u32 %p3, %tid, 0;\n@%p3 st.shared.u32 [%buffer+1024], 0;\n"
        wait = FLAG.format(load=load)
        if "atom" in load:
            wait = wait.replace("[%buffer+1024]", "[%buffer+1024], 0")
        return head + between(first=write + before + store + late, order="", second=wait + after + READ)

    legal = flagged(before, after)
    check(flagged(before, after, write="", late=WRITE), legal, "race in shared memory")
    if before:
        check(flagged("", after), legal, "race in shared memory")
        check(flagged("", after, write=before + WRITE), legal, "race in shared memory")
    if after:
        check(flagged(before, ""), legal, "race in shared memory")


def test_an_mbarrier_orders():
    init, arrive = INIT.replace("], 1;", "], 32;", 1), "mbarrier.arrive.shared::cta.b64 _, [%bar];\n"
    wait = "\nWAIT(%bar,0)\n"
    legal = init + between(first=WRITE + "\n" + arrive, order="", second=wait + READ)
    check(init + between(first=arrive + WRITE, order="", second=wait + READ), legal, "race in shared memory")


# ---- Stages of a pipeline: warp 0 loads a stage twice, warp 1 reads it.
PIPELINE = (
    INIT.replace("[%bar1], 1", "[%bar1], {arrivals}")
    + """
and.b32 %r1, %tid, 31;
setp.ge.u32 %p1, %tid, 32;
@%p1 bra CONSUMER;
setp.ne.u32 %p2, %r1, 0;
@%p2 bra END;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 512;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%buffer], [%a0], 512, [%bar];
WAIT(%bar1,0)
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 512;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%buffer], [%a0], 512, [%bar];
WAIT(%bar,1)
bra END;
CONSUMER:
setp.ne.u32 %p3, %r1, 0;
shl.b32 %r2, %r1, 4;
add.u32 %r2, %r2, %buffer;
WAIT(%bar,0)
{consume}
END:
"""
)
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%bar1];\n"
LOADS = {
    "ld": "ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r2];\n",
    "ldmatrix": "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r2];\n",
}


@pytest.mark.parametrize("load", LOADS)
def test_stage_released_too_early(load):
    released = PIPELINE.format(arrivals=32, consume=LOADS[load] + ARRIVE)
    too_early = PIPELINE.format(arrivals=32, consume=ARRIVE + LOADS[load])
    check(too_early, released, "race in shared memory", "read while a copy is in flight")


def test_an_arrival_too_few_is_awaited():
    bug, legal = (PIPELINE.format(arrivals=count, consume=LOADS["ld"] + ARRIVE) for count in (31, 32))
    check(bug, legal, "race in shared memory")


def test_a_phase_may_not_end_before_the_wait_for_the_last_one():
    """Warp 0 ends two phases, warp 1 waits for each. Its answer lets warp 0 go on: before the wait it is too early."""
    body = INIT + between(
        first="@!%p3 mbarrier.arrive.shared::cta.b64 _, [%bar];\nWAIT(%bar1,0)\n"
        "@!%p3 mbarrier.arrive.shared::cta.b64 _, [%bar];",
        order="",
        second="{}WAIT(%bar,1)\n",
    ).replace("setp.ge.u32 %p1", "setp.ne.u32 %p3, %r2, 0;\nsetp.ge.u32 %p1")
    answer = "bar.warp.sync 0xffffffff;\n@!%p3 mbarrier.arrive.shared::cta.b64 _, [%bar1];\n"
    peek = "mbarrier.test_wait.parity.shared::cta.b64 %p5, [%bar], 0;\n"
    wait = "WAIT(%bar,0)\n"
    for legal in (wait + answer, peek + wait + peek + answer):
        check(body.format(answer + wait), body.format(legal), "mbarrier phase overrun", "dead-lock")
    texts = []
    for seed in SEEDS:
        with pytest.raises(hoppersim.Fault) as caught:
            launch(kernel(body.format(answer + wait)), (np.zeros(64, np.uint32),), threads=64, seed=seed)
        texts.append(str(caught.value))
    told = [text for text in texts if text.startswith("mbarrier phase overrun")]
    assert told and all(re.search(r"phase 1 .* by CTA \(0, 0, 0\), warp 1, lane 0 at ptx", text) for text in told), (
        texts
    )


@pytest.mark.parametrize("load", LOADS)
def test_one_lane_releases_for_its_warp(load):
    legal = LOADS[load] + "bar.warp.sync 0xffffffff;\n@!%p3 " + ARRIVE
    bug = LOADS[load] + "@!%p3 " + ARRIVE
    check(PIPELINE.format(arrivals=1, consume=bug), PIPELINE.format(arrivals=1, consume=legal), "race in shared memory")


def test_one_lane_waits_for_its_warp():
    wait = "@%p3 bra WAITED;\nWAIT(%bar,0)\nWAITED:\n"
    body = PIPELINE.replace("WAIT(%bar,0)\n{consume}", "{consume}")
    bug = body.format(arrivals=32, consume=wait + LOADS["ld"] + ARRIVE)
    legal = body.format(arrivals=32, consume=wait + "bar.warp.sync 0xffffffff;\n" + LOADS["ld"] + ARRIVE)
    check(bug, legal, "race in shared memory", "read while a copy is in flight", "uninitialised shared memory")


def test_copied_bytes_are_read_without_a_wait():
    """Warp 1 waits for the copy and warp 0, which reads too, does not."""
    body = (
        INIT
        + """
    setp.ne.u32 %p1, %tid, 0;
    @%p1 bra ISSUED;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 512;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%buffer], [%a0], 512, [%bar];
    ISSUED:
    setp.lt.u32 %p2, %tid, 32;
    @%p2 bra READ;
    WAIT(%bar,0)
    READ:
    {order}
    ld.shared.u32 %r3, [%buffer];
    WAIT(%bar,0)
    """
    )
    check(body.format(order=""), body.format(order=BAR), "race in shared memory", "read while a copy is in flight",
          "uninitialised shared memory")  # fmt: skip


def test_source_of_a_bulk_store_is_released_too_early():
    body = """
    shl.b32 %r1, %tid, 2;
    add.u32 %r1, %r1, %buffer;
    st.shared.u32 [%r1], %tid;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.u32 %p1, %tid, 0;
    @%p1 bra STORED;
    cp.async.bulk.global.shared::cta.bulk_group [%a0], [%buffer], 256;
    cp.async.bulk.commit_group;
    {first}
    STORED:
    bar.sync 0;
    {second}
    st.shared.u32 [%r1], 5;
    """
    wait = "cp.async.bulk.wait_group.read 0;"
    check(body.format(first="", second="@!%p1 " + wait), body.format(first=wait, second=""), "race in shared memory",
          "race within a warp", "overwritten while read")  # fmt: skip


def test_cp_async_is_a_write_of_its_lane():
    body = """
    mul.wide.u32 %rd1, %tid, 16;
    add.u64 %rd1, %rd1, %a0;
    shl.b32 %r1, %tid, 4;
    add.u32 %r1, %r1, %buffer;
    xor.b32 %r2, %r1, 1008;
    cp.async.cg.shared.global [%r1], [%rd1], 16;
    {first}
    bar.sync 0;
    {second}
    ld.shared.u32 %r3, [{address}];
    """
    wait = "cp.async.wait_all;"
    legal = body.format(first=wait, second="", address="%r2")
    check(body.format(first="", second=wait, address="%r2"), legal, "race in shared memory", "race within a warp",
          "read while a copy is in flight")  # fmt: skip
    assert outcomes(body.format(first="", second=wait, address="%r1")) == {None}


# ---- mbarriers, clusters, exit
def test_mbarrier_is_used_before_the_others_know_of_it():
    body = INIT.replace(BAR, "{order}") + "mbarrier.arrive.shared::cta.b64 _, [%bar];\n"
    body = body.replace("[%bar], 1;", "[%bar], 64;")
    check(body.format(order=""), body.format(order=BAR), "unsynchronised shared memory", "uninitialised mbarrier")


@pytest.mark.parametrize("lanes", [1, 4])
def test_lanes_initialise_an_mbarrier_each(lanes):
    body = f"""
    shl.b32 %r1, %tid, 3;
    add.u32 %r1, %r1, %bar;
    setp.ge.u32 %p0, %tid, {lanes};
    @%p0 bra READY;
    mbarrier.init.shared::cta.b64 [%r1], 1;
    {{fence}}
    READY:
    bar.sync 0;
    setp.ne.u32 %p0, %tid, 40;
    @%p0 bra END;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar+{8 * (lanes - 1)}], 512;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%buffer], [%a0], 512, [%bar+{8 * (lanes - 1)}];
    WAIT(%bar+{8 * (lanes - 1)},0)
    END:
    """
    fence = "fence.mbarrier_init.release.cluster;"
    check(body.format(fence=""), body.format(fence=fence), "mbarrier not fenced for the async proxy")


def test_mbarrier_of_another_cta():
    body = """
    setp.ne.u32 %p0, %tid, 0;
    @%p0 bra READY;
    mbarrier.init.shared::cta.b64 [%bar], 1;
    {fence}
    READY:
    {arrive}
    barrier.cluster.wait.aligned;
    @%p0 bra END;
    mov.u32 %r1, %cluster_ctarank;
    xor.b32 %r1, %r1, 1;
    mapa.shared::cluster.u32 %r2, %bar, %r1;
    mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r2];
    WAIT(%bar,0)
    END:
    """
    relaxed, releasing = "barrier.cluster.arrive.relaxed.aligned;", "barrier.cluster.arrive.aligned;"
    init = "fence.mbarrier_init.release.cluster;"
    kinds = "missing mbarrier_init fence", "uninitialised mbarrier"
    check(body.format(fence="", arrive=relaxed), body.format(fence=init, arrive=relaxed), *kinds, cluster=2)
    assert outcomes(body.format(fence="", arrive=releasing), cluster=2) == {None}


REMOTE = """
shl.b32 %r1, %tid, 2;
add.u32 %r1, %r1, %buffer;
st.shared.u32 [%r1], %tid;
mov.u32 %r2, %cluster_ctarank;
xor.b32 %r2, %r2, 1;
mapa.shared::cluster.u32 %r3, %r1, %r2;
{before}
{access}
{after}
"""
CLUSTER = "barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;"


@pytest.mark.parametrize("access", ["ld.shared::cluster.u32 %r4, [%r3];", "st.shared::cluster.u32 [%r3], 99;"])
def test_shared_memory_of_another_cta(access):
    legal = REMOTE.format(before=CLUSTER, access=access, after=CLUSTER)
    race = REMOTE.format(before="", access=access, after=CLUSTER)
    check(race, legal, "race in shared memory", "uninitialised shared memory", cluster=2)
    ends = REMOTE.format(before=CLUSTER, access=access, after="")
    check(ends, legal, "access to an ended CTA", cluster=2)


# ---- Lanes of a warp
LANES = """
shl.b32 %r1, %tid, 2;
add.u32 %r1, %r1, %buffer;
xor.b32 %r2, %r1, {other};
st.shared.u32 [%r1], %tid;
{order}
{access}
"""
SYNC = "bar.warp.sync 0xffffffff;"


@pytest.mark.parametrize("access", ["ld.shared.u32 %r3, [%r2];", "st.shared.u32 [%r2], 77;"])
def test_lanes_without_bar_warp_sync(access):
    check(LANES.format(other=4, order="", access=access), LANES.format(other=4, order=SYNC, access=access),
          "race within a warp")  # fmt: skip
    assert outcomes(LANES.format(other=0, order="", access=access)) == {None}


def test_lanes_without_bar_warp_sync_before_a_write():
    body = LANES.format(other=4, order=SYNC, access="ld.shared.u32 %r3, [%r2];\n{order}\nst.shared.u32 [%r1], 3;")
    check(body.format(order=""), body.format(order=SYNC), "race within a warp")


def test_narrow_accesses_of_lanes():
    body = """
    shl.b32 %r1, %tid, 1;
    add.u32 %r1, %r1, %buffer;
    st.shared.b16 [%r1], 1;
    {order}
    ld.shared.b16 %h2, [{address}];
    st.shared.b16 [%r1], 2;
    """
    assert outcomes(body.format(order="", address="%r1")) == {None}
    other = "xor.b32 %r2, %r1, 2;"
    check(body.format(order=other, address="%r2"), body.format(order=other + SYNC, address="%r1"), "race within a warp")


def test_half_of_a_warp_synchronises():
    """Each half by its own mask: orders its lanes and not the other half's."""
    halves = """
    and.b32 %r5, %tid, 31;
    setp.ge.u32 %p1, %r5, 16;
    @%p1 bra UPPER;
    bar.warp.sync 0xffff;
    bra JOINED;
    UPPER:
    bar.warp.sync 0xffff0000;
    JOINED:
    """
    read = "ld.shared.u32 %r3, [%r2];"
    check(LANES.format(other=64, order=halves, access=read), LANES.format(other=32, order=halves, access=read),
          "race within a warp")  # fmt: skip


def test_lanes_of_one_instruction():
    check(
        "st.shared.u32 [%buffer], %tid;",
        "st.shared.u32 [%buffer], 7;\natom.shared.exch.b32 %r1, [%buffer], %tid;",
        "race within a warp",
        threads=32,
    )
    check("st.shared.u32 [%buffer], %tid;", "st.shared.u32 [%buffer], 7;\nld.shared.u32 %r1, [%buffer];",
          "race within a warp", threads=32)  # fmt: skip


# ---- Global memory that the copy engine reads
GLOBAL = (
    INIT
    + """
setp.ne.u32 %p0, %tid, 0;
{store}
{fence}
bar.sync 0;
@%p0 bra END;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 512;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%buffer], [%a0], 512, [%bar];
WAIT(%bar,0)
END:
"""
)


def test_global_writes_before_a_bulk_load():
    store = "mul.wide.u32 %rd1, %tid, 4;\nadd.u64 %rd1, %rd1, %a0;\nst.global.u32 [%rd1], %tid;"
    elsewhere = store.replace("[%rd1]", "[%rd1+4096]")
    for fence in ("fence.proxy.async;", "fence.proxy.async.global;"):
        check(GLOBAL.format(store=store, fence=""), GLOBAL.format(store=store, fence=fence), "missing proxy fence")
    check(GLOBAL.format(store=store, fence="fence.proxy.async.shared::cta;"), GLOBAL.format(store=elsewhere, fence=""),
          "missing proxy fence")  # fmt: skip


def test_a_fence_of_global_memory_is_none_of_shared_memory():
    body = """
    st.shared.u32 [%buffer], 1;
    st.shared.u32 [%buffer+4], 1;
    st.shared.u32 [%buffer+8], 1;
    st.shared.u32 [%buffer+12], 1;
    {fence}
    bar.sync 0;
    setp.ne.u32 %p0, %tid, 0;
    @%p0 bra END;
    cp.async.bulk.global.shared::cta.bulk_group [%a0], [%buffer], 16;
    cp.async.bulk.commit_group;
    cp.async.bulk.wait_group 0;
    END:
    """
    bug, legal = body.format(fence="fence.proxy.async.global;"), body.format(fence="fence.proxy.async.shared::cta;")
    check(bug, legal, "missing proxy fence")
