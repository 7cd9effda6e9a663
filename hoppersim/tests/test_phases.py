"""Waits that may say false, and the order of the phases of an mbarrier. Each planted bug is found at every schedule."""

import pytest
from async_ptx import INIT, finding
from test_races import check, outcomes

# ---- A wait says false while its phase may be incomplete

LOAD = (
    INIT
    + """
@%p0 bra ISSUED;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], 512;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%buffer], [%a0], 512, [%bar];
ISSUED:
"""
)
READ = "shl.b32 %r1, %tid, 2;\nadd.u32 %r1, %r1, %buffer;\nld.shared.u32 %r2, [%r1];\n"
ASK = "mbarrier.{}.parity.shared::cta.b64 %p5, [%bar], 0;\n"
IN_FLIGHT = "read while a copy is in flight", "uninitialised shared memory"


def tries(wait: str, most: int) -> str:
    """At most so many, then on."""
    return f"""
    mov.u32 %r3, 0;
    AGAIN: {ASK.format(wait)}
    @%p5 bra COMPLETE;
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p6, %r3, {most};
    @%p6 bra AGAIN;
    COMPLETE:
    """


@pytest.mark.parametrize("wait", ["try_wait", "test_wait"])
@pytest.mark.parametrize("most", [1, 4])
def test_the_result_of_a_wait_matters(wait, most):
    legal = tries(wait, 1_000_000) + "@!%p5 trap;\n"
    check(LOAD + tries(wait, most) + READ, LOAD + legal + READ, *IN_FLIGHT)


def test_one_thread_waits_once_for_all():
    once = "@!%p0 " + ASK.format("try_wait") + "bar.sync 0;\n"
    check(LOAD + once + READ, LOAD + "@%p0 bra WAITED;\nWAIT(%bar,0)\nWAITED:\nbar.sync 0;\n" + READ, *IN_FLIGHT)


def test_a_wait_for_what_is_known_to_be_complete_says_true():
    """The second wait comes after another warp's, or its phase precedes the first."""
    again = ASK.format("try_wait") + "@!%p5 trap;\n" + ASK.format("test_wait") + "@!%p5 trap;\n"
    after = "@%p0 bra WAITED;\nWAIT(%bar,0)\nWAITED:\nbar.sync 0;\n"
    check(LOAD + again, LOAD + after + again + READ, "trap")
    assert outcomes(INIT + again.replace(", 0;", ", 1;")) == {None}


# ---- A wait by parity comes after the end of the phase before

SKIPPED = (
    INIT
    + """
shr.u32 %r5, %tid, 5;
and.b32 %r6, %tid, 31;
setp.ne.u32 %p3, %r6, 0;
setp.eq.u32 %p1, %r5, 1;
@%p1 bra SECOND;
setp.eq.u32 %p2, %r5, 2;
@%p2 bra THIRD;
@!%p3 mbarrier.arrive.shared::cta.b64 _, [%bar];
{first}
WAIT(%bar1,0)
@!%p3 st.shared.u32 [%buffer], 7;
bar.warp.sync 0xffffffff;
@!%p3 mbarrier.arrive.shared::cta.b64 _, [%bar];
bra END;
SECOND:
WAIT(%bar,0)
bar.warp.sync 0xffffffff;
{second}
@!%p3 mbarrier.arrive.shared::cta.b64 _, [%bar1];
bra END;
THIRD:
{third}
WAIT(%bar,1)
ld.shared.u32 %r7, [%buffer];
END:
"""
)


def test_a_phase_is_skipped():
    """Warp 2 waits for phase 1 only. It must know of the end of phase 0: from its waiter, or from who ended it."""
    bug, together = SKIPPED.format(first="", second="", third=""), "bar.sync 1, 64;"
    for first, second in ((together, ""), ("", together)):
        legal = SKIPPED.format(first=first, second=second, third=together)
        check(bug, legal, "mbarrier phase skipped", "race in shared memory", "uninitialised shared memory", threads=96)
    slow = "mov.u32 %r8, 0;\nSLOW: add.u32 %r8, %r8, 1;\nsetp.lt.u32 %p6, %r8, 2000;\n@%p6 bra SLOW;"
    text = str(finding(SKIPPED.format(first="", second="", third=slow), threads=96))
    assert text.startswith("mbarrier phase skipped") and "phase 1 of" in text and "warp 2" in text, text


def test_the_parity_of_an_older_phase():
    """Parity 1 once more, when phases 0 and 1 are over: it was to be parity 0."""
    load = LOAD.removeprefix(INIT).replace("ISSUED", "ISSUED{0}")
    steps = [load.format(n) + "{}" + READ + "bar.sync 0;\n" for n in range(3)]
    waits = [f"WAIT(%bar,{parity})\n" for parity in (0, 1, 0)]
    legal = INIT + "".join(step.format(wait) for step, wait in zip(steps, waits, strict=True))
    bug = INIT + steps[0].format(waits[0]) + steps[1].format("") + steps[2].format(waits[2])
    check(bug, legal, "mbarrier phase skipped", "mbarrier phase overrun", "race in shared memory",
          "too many arrivals", *IN_FLIGHT)  # fmt: skip


# ---- An expect_tx comes before an arrival of its phase

ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%bar];\n"
EXPECT = "mbarrier.expect_tx.shared::cta.b64 [%bar], {};\n"
ARRIVE_EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {};\n"
COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{}], [%a0], {}, [%bar];\n"


def expecting(first: str, others: str, count: int) -> str:
    body = INIT.replace("[%bar], 1", f"[%bar], {count}") + "add.u32 %r9, %buffer, 128;\n@%p0 bra OTHERS;\n"
    return body + first + "bra ON;\nOTHERS:\n" + others + "ON:\nWAIT(%bar,0)\n" + READ


def test_bytes_expected_after_the_arrival():
    copy = COPY.format("%buffer", 256)
    legal = expecting(EXPECT.format(256) + copy + ARRIVE, ARRIVE, 64)
    behind = expecting(ARRIVE + EXPECT.format(256) + copy, "ON:\nbar.sync 0;\n@%p0 " + ARRIVE, 64)
    behind = behind.replace("ON:\nWAIT", "WAIT")
    bug = expecting(ARRIVE + EXPECT.format(256) + copy, ARRIVE, 64)
    for right in (legal, behind):
        check(bug, right, "expect_tx too late", *IN_FLIGHT)


def test_more_bytes_expected_after_the_arrival():
    """Legal where bytes are missing until a copy behind the second expect_tx brings them."""
    half, rest, whole = COPY.format("%buffer", 128), COPY.format("%r9", 128), COPY.format("%buffer", 256)
    expect, more = ARRIVE_EXPECT.format(128), EXPECT.format(128)
    read = "bar.sync 0;\nld.shared.u32 %r2, [%r9];\n"
    for legal in (expect + more + whole, expect + more + half + rest, more + expect + half + rest):
        bug = expecting(expect + half + more + rest, "", 1) + read
        check(bug, expecting(legal, "", 1), "expect_tx too late", *IN_FLIGHT)


# ---- What a dead-lock is called


def test_a_dead_lock_behind_a_barrier_is_told_as_what_it_is():
    """Lane 0 waits for bytes that never come, the other lanes of its warp for lane 0."""
    wait = "@%p0 bra WAITED;\nWAIT(%bar,0)\nWAITED:\nbar.sync 0;\n" + READ
    check(LOAD.replace("512;", "528;") + wait, LOAD + wait, "expect_tx too large")
    check(INIT + wait, LOAD + wait, "dead-lock")


def test_lanes_at_different_barriers():
    apart = "@%p0 bra OTHERS;\nbar.sync 1, 64;\nbra ON;\nOTHERS: bar.sync 1, 64;\nON:\n"
    check(INIT + apart, INIT + "bar.sync 1, 64;\n", "divergent aligned instruction")
