"""Stages of a ring: released before their wgmma has been waited for, and filled by cp.async of many lanes. The bug is
found in each schedule and timing, the same code made right is not reported.
"""

import pytest
from test_races import check

# ---- A warpgroup multiplies stages that warp 4 (8) loads: full at [%bar] and [%bar+8], empty at [%bar+16], [%bar+24]
STAGE, A_BYTES, B_BYTES, ROUNDS = 4096, 64 * 32, 8 * 32, 4
DESCRIPTOR = (8 | 16 << 16) << 16  # no swizzle; core matrices are 128 bytes apart, their groups of 8 rows 256
MULTIPLY = (
    "wgmma.fence.sync.aligned;\n"
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %rd10, %rd11, 1, 1, 1, 0, 0;\n"
    "wgmma.commit_group.sync.aligned;\n"
)
TOGETHER = "bar.sync 1, 128;\n"


def ring(consume, *, ring_of: str, groups: int = 1, arrivals: int = 4) -> str:
    """``consume(round, multiply, arrive, first)``: what a warpgroup does when a stage is full; `arrive(round)` releases
    that round's stage by one lane of each warp, `first(round)` by one thread. ``ring_of``: the operand whose stages are
    loaded again and again; the other is loaded once.
    """
    begin = ["setp.ne.u32 %p0, %tid, 0;", "@%p0 bra READY;"]
    begin += [f"mbarrier.init.shared::cta.b64 [%bar+{8 * n}], {1 if n < 2 else arrivals};" for n in range(4)]
    begin += ["fence.mbarrier_init.release.cluster;", "READY: bar.sync 0;", "and.b32 %r1, %tid, 31;"]
    begin += ["setp.eq.u32 %p1, %r1, 0;", "and.b32 %r1, %tid, 127;", "setp.eq.u32 %p2, %r1, 0;"]
    begin += [f"setp.lt.u32 %p3, %tid, {128 * groups};", "@%p3 bra CONSUMER;", "@!%p1 bra END;"]
    producer, consumer = [], ["CONSUMER:"]
    for r in range(ROUNDS):
        stage = r % 2
        loads = [(0, A_BYTES), (A_BYTES, B_BYTES)]
        if r >= 2:
            producer.append(f"add.u32 %r2, %bar, {16 + 8 * stage};\nWAIT(%r2,{r // 2 - 1})")
            loads = [loads[ring_of == "B"]]
        bytes = sum(size for _, size in loads)
        producer.append(f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar+{8 * stage}], {bytes};")
        for at, size in loads:
            producer.append(
                "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                f"[%buffer+{stage * STAGE + at}], [%a0], {size}, [%bar+{8 * stage}];"
            )
        consumer.append(f"add.u32 %r2, %bar, {8 * stage};\nWAIT(%r2,{r // 2})")
        for register, at in ((10, 0), (11, A_BYTES)):
            consumer.append(f"add.u32 %r3, %buffer, {stage * STAGE + at};\nshr.u32 %r3, %r3, 4;")
            consumer.append(f"cvt.u64.u32 %rd{register}, %r3;\nadd.u64 %rd{register}, %rd{register}, {DESCRIPTOR};")

        def release(of: int, guard: str) -> str:
            return f"{guard} mbarrier.arrive.shared::cta.b64 _, [%bar+{16 + 8 * (of % 2)}];\n" if of >= 0 else ""

        consumer.append(consume(r, MULTIPLY, lambda of: release(of, "@%p1"), lambda of: release(of, "@%p2")))
    last = ["wgmma.wait_group.sync.aligned 0;", "END:"]
    return "\n".join([*begin, *producer, "bra END;", *consumer, *last])


WAIT_ALL, WAIT_ALL_BUT_ONE = "wgmma.wait_group.sync.aligned 0;\n", "wgmma.wait_group.sync.aligned 1;\n"
LEGAL = {
    "after its wait": lambda r, multiply, arrive, first: multiply + WAIT_ALL + arrive(r),
    "one round later": lambda r, multiply, arrive, first: multiply + WAIT_ALL_BUT_ONE + arrive(r - 1),
}
BUGS = {
    "before the wait": lambda r, multiply, arrive, first: multiply + arrive(r) + WAIT_ALL,
    "before the wgmma": lambda r, multiply, arrive, first: arrive(r) + multiply + WAIT_ALL,
    "before the commit": lambda r, multiply, arrive, first: (
        multiply.replace("wgmma.commit", arrive(r) + "wgmma.commit") + WAIT_ALL
    ),
    "a round too early": lambda r, multiply, arrive, first: multiply + WAIT_ALL_BUT_ONE + arrive(r),
}
FOUND = "race in shared memory", "overwritten while read", "read while a copy is in flight"


@pytest.mark.parametrize("ring_of", ["A", "B"])
@pytest.mark.parametrize("bug", BUGS)
def test_stage_released_before_its_wgmma_is_done(bug, ring_of):
    legal = LEGAL["one round later" if bug == "a round too early" else "after its wait"]
    check(ring(BUGS[bug], ring_of=ring_of), ring(legal, ring_of=ring_of), *FOUND, threads=160)


@pytest.mark.parametrize("ring_of", ["A", "B"])
def test_one_thread_releases_for_its_warpgroup(ring_of):
    """It may: its wait covers the wgmma of all four warps."""

    def legal(r, multiply, arrive, first):
        return multiply + WAIT_ALL + first(r)

    def bug(r, multiply, arrive, first):
        return multiply + TOGETHER + first(r) + WAIT_ALL

    check(ring(bug, ring_of=ring_of, arrivals=1), ring(legal, ring_of=ring_of, arrivals=1), *FOUND, threads=160)


@pytest.mark.parametrize("ring_of", ["A", "B"])
def test_a_second_warpgroup_reads_the_stage_too(ring_of):
    """Only the first warpgroup's arrival is counted, and the second does not arrive."""

    def both(r, multiply, arrive, first):
        return multiply + WAIT_ALL + first(r)

    def one(r, multiply, arrive, first):
        return multiply + WAIT_ALL + "setp.eq.u32 %p2, %tid, 0;\n" + first(r)

    options = {"ring_of": ring_of, "groups": 2}
    check(ring(one, arrivals=1, **options), ring(both, arrivals=2, **options), *FOUND, threads=288)


# ---- Warps 0 and 1 fill a stage twice by cp.async, 16 bytes a lane; warps 2 and 3 read what other lanes copied
COPIES = """
setp.ne.u32 %p0, %tid, 0;
@%p0 bra READY;
mbarrier.init.shared::cta.b64 [%bar], 64;
mbarrier.init.shared::cta.b64 [%bar1], 64;
READY: bar.sync 0;
and.b32 %r1, %tid, 63;
shl.b32 %r1, %r1, 4;
cvt.u64.u32 %rd1, %r1;
add.u64 %rd1, %a0, %rd1;
add.u32 %r2, %buffer, %r1;
xor.b32 %r3, %r2, 0x110;
setp.ge.u32 %p1, %tid, 64;
@%p1 bra CONSUMER;
cp.async.cg.shared.global [%r2], [%rd1], 16;
{full}
{empty}
cp.async.cg.shared.global [%r2], [%rd1], 16;
{full}
WAIT(%bar,1)
bra END;
CONSUMER:
{wait}
{consume}
WAIT(%bar,1)
ld.shared.u32 %r6, [%r3];
END:
"""
FULL = {
    "noinc": "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%bar];",
    "counted": "cp.async.mbarrier.arrive.shared::cta.b64 [%bar];\nmbarrier.arrive.shared::cta.b64 _, [%bar];",
}
READ, RELEASE = "ld.shared.u32 %r5, [%r3];\n", "mbarrier.arrive.shared::cta.b64 _, [%bar1];\n"
PARTS = {"empty": "WAIT(%bar1,0)", "wait": "WAIT(%bar,0)", "consume": READ + RELEASE}
COPY_BUGS = {
    "read without a wait": {"wait": ""},
    "written without a wait": {"empty": ""},
    "released before it is read": {"consume": RELEASE + READ},
    "arrives before its copy is done": {"full": "mbarrier.arrive.shared::cta.b64 _, [%bar];"},
}


@pytest.mark.parametrize("arrive", FULL)
@pytest.mark.parametrize("bug", COPY_BUGS)
def test_stage_filled_by_cp_async(bug, arrive):
    parts = {"full": FULL[arrive], **PARTS}
    kinds = "race in shared memory", "read while a copy is in flight", "uninitialised shared memory"
    check(COPIES.format(**{**parts, **COPY_BUGS[bug]}), COPIES.format(**parts), *kinds,
          "overwritten while a copy is in flight", threads=128)  # fmt: skip


def test_cp_async_is_issued_after_the_arrival():
    """The arrival is for the copies before it."""
    parts = {"full": FULL["noinc"], **PARTS}
    copy = "cp.async.cg.shared.global [%r2], [%rd1], 16;\n"
    late = COPIES.replace(copy + "{full}\n", "{full}\n" + copy)
    check(late.format(**parts), COPIES.format(**parts), "race in shared memory", "read while a copy is in flight",
          "uninitialised shared memory", "overwritten while a copy is in flight", threads=128)  # fmt: skip
