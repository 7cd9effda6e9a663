"""mbarrier.*: phases, counts, tokens, transaction bytes, clocks, and what their misuse is reported as."""

import re

import numpy as np
import pytest
from async_ptx import INIT, both_timings, finding, kernel, launch
from refusal import refusal
from test_races import check, outcomes


def values(body: str, count: int, **options) -> list[int]:
    out = np.zeros(64, np.uint32)
    launch(kernel(body), (out,), **options)
    return out[:count].tolist()


@both_timings
def test_tokens_counts_and_phases(timing):
    body = """
    mbarrier.init.shared::cta.b64 [%bar], 5;
    mbarrier.arrive.shared::cta.b64 %rd1, [%bar];
    mbarrier.pending_count.b64 %r1, %rd1;
    st.global.u32 [%a0], %r1;
    mbarrier.arrive.noComplete.release.cta.shared::cta.b64 %rd2, [%bar], 2;
    mbarrier.pending_count.b64 %r1, %rd2;
    st.global.u32 [%a0+4], %r1;
    mbarrier.test_wait.shared::cta.b64 %p1, [%bar], %rd1;
    selp.u32 %r1, 1, 0, %p1;
    st.global.u32 [%a0+8], %r1;
    mbarrier.arrive.release.cta.shared::cta.b64 _, [%bar], 2;
    mbarrier.test_wait.acquire.cta.shared::cta.b64 %p1, [%bar], %rd1;
    selp.u32 %r1, 1, 0, %p1;
    st.global.u32 [%a0+12], %r1;
    mbarrier.test_wait.parity.shared::cta.b64 %p1, [%bar], 0;
    mbarrier.test_wait.parity.shared::cta.b64 %p2, [%bar], 1;
    selp.u32 %r1, 1, 0, %p1;
    selp.u32 %r2, 1, 0, %p2;
    st.global.v2.u32 [%a0+16], {%r1, %r2};
    mbarrier.arrive_drop.shared::cta.b64 %rd3, [%bar], 3;
    mbarrier.arrive.shared::cta.b64 %rd3, [%bar], 2;
    mbarrier.arrive.b64 %rd4, [%rd9];
    mbarrier.pending_count.b64 %r1, %rd4;
    st.global.u32 [%a0+24], %r1;
    mbarrier.inval.shared::cta.b64 [%bar];
    """.replace("mbarrier.arrive.b64", "cvt.u64.u32 %rd9, %bar;\n cvta.shared.u64 %rd9, %rd9;\n mbarrier.arrive.b64")
    # pending before each arrival: 5, 4; not complete; complete; parity 0 complete, 1 not; after the drop of 3 a phase
    # has 2 arrivals
    assert values(body, 7, threads=1, timing=timing) == [5, 4, 0, 1, 1, 0, 2]


@both_timings
@pytest.mark.parametrize("seed", range(4))
def test_warps_pass_a_value_around(timing, seed):
    """Each of 10 rounds: 64 threads add, arrive, wait. The waits are the only order."""
    body = """
    setp.ne.u32 %p0, %tid, 0;
    @%p0 bra GO;
    mbarrier.init.shared::cta.b64 [%bar], 64;
    st.shared.u32 [%buffer], 0;
    GO: bar.sync 0;
    mov.u32 %r1, 0;
    LOOP:
    atom.shared.add.u32 %r3, [%buffer], 1;
    mbarrier.arrive.shared::cta.b64 _, [%bar];
    and.b32 %r2, %r1, 1;
    SPIN: mbarrier.POLL.parity.shared::cta.b64 %p1, [%bar], %r2HINT;
    @!%p1 bra SPIN;
    setp.ne.u32 %p2, %r1, 9;
    add.u32 %r1, %r1, 1;
    @%p2 bra LOOP;
    ld.shared.u32 %r4, [%buffer];
    @!%p0 st.global.u32 [%a0], %r4;
    """
    for poll, hint in (("try_wait", ""), ("try_wait", ", 0x989680"), ("test_wait", "")):
        assert values(body.replace("POLL", poll).replace("HINT", hint), 1, threads=64, timing=timing, seed=seed) == [
            640
        ]


@both_timings
def test_bytes_by_hand(timing):
    body = """
    mbarrier.init.shared::cta.b64 [%bar], 1;
    mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%bar], 48;
    mbarrier.arrive.expect_tx.shared::cta.b64 %rd1, [%bar], 16;
    mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%bar], 60;
    mbarrier.test_wait.shared::cta.b64 %p1, [%bar], %rd1;
    mbarrier.complete_tx.shared::cta.b64 [%bar], 4;
    mbarrier.test_wait.shared::cta.b64 %p2, [%bar], %rd1;
    selp.u32 %r1, 1, 0, %p1;
    selp.u32 %r2, 1, 0, %p2;
    st.global.v2.u32 [%a0], {%r1, %r2};
    """
    assert values(body, 2, threads=1, timing=timing) == [0, 1]


ORDER = """
{init}
setp.ge.u32 %p1, %tid, 32;
@%p1 bra CONSUMER;
st.shared.u32 [%buffer], 77;
fence.proxy.async.shared::cta;
{release}
bra END;
CONSUMER:
WAIT(%bar,0)
cp.async.bulk.global.shared::cta.bulk_group [%a0], [%buffer], 16;
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
END:
"""


def ordered(sem: str) -> str:
    # One lane of each warp works; the buffer's other words are written by nobody, so the store copies one granule of
    # four.
    text = ORDER.format(init=INIT, release=f"mbarrier.arrive{sem}.shared::cta.b64 _, [%bar];")
    return text.replace(
        "st.shared.u32 [%buffer], 77;",
        (
            "and.b32 %r1, %tid, 31;\nsetp.ne.u32 %p2, %r1, 0;\n@%p2 bra END;\nmov.u32 %r2, 77;\n"
            "st.shared.v4.u32 [%buffer], {%r2, %r2, %r2, %r2};"
        ),
    ).replace("WAIT(", "and.b32 %r1, %tid, 31;\nsetp.ne.u32 %p2, %r1, 0;\n@%p2 bra END;\nWAIT(")


@both_timings
@pytest.mark.parametrize("seed", range(4))
def test_arrival_releases_what_the_wait_acquires(timing, seed):
    assert values(ordered(""), 4, threads=64, timing=timing, seed=seed) == [77] * 4


def test_relaxed_arrival_orders_nothing():
    assert finding(ordered(".relaxed.cta"), threads=64).kind == "unsynchronised shared memory"


BAR = "mbarrier.init.shared::cta.b64 [%bar], 1;\nfence.mbarrier_init.release.cluster;\n"
LOAD = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%buffer], [%a0], 64, [%bar];\n"
EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar], {};\n"
WAIT = "WAIT(%bar,0)\n"
MISUSE = {
    "no init": ("mbarrier.arrive.shared::cta.b64 _, [%bar];", "uninitialised mbarrier"),
    "wait without init": (WAIT, "uninitialised mbarrier"),
    "after inval": (
        BAR + "mbarrier.inval.shared::cta.b64 [%bar];\nmbarrier.arrive.shared::cta.b64 _, [%bar];",
        "uninitialised mbarrier",
    ),
    "init twice": (BAR + BAR, "mbarrier misuse"),
    "count 0": ("mbarrier.init.shared::cta.b64 [%bar], 0;", "mbarrier misuse"),
    "parity 2": (BAR + "WAIT(%bar,2)", "mbarrier misuse"),
    "noComplete completes": (
        BAR + "mbarrier.arrive.noComplete.release.cta.shared::cta.b64 %rd1, [%bar], 1;",
        "mbarrier misuse",
    ),
    "more than expected": (BAR + "mbarrier.arrive.shared::cta.b64 _, [%bar], 2;", "too many arrivals"),
    "misaligned": ("add.u32 %r1, %bar, 4;\nmbarrier.init.shared::cta.b64 [%r1], 1;", "misaligned shared"),
    "armed again before its bytes came": (BAR + EXPECT.format(64) * 2, "too many arrivals"),
    "count out of range": (
        BAR + "mbarrier.expect_tx.shared::cta.b64 [%bar], 0x100000;",
        "transaction count out of range",
    ),
    "too few bytes expected": (BAR + EXPECT.format(48) + LOAD + WAIT, "expect_tx too small"),
    "none expected": (BAR + LOAD + "mbarrier.arrive.shared::cta.b64 _, [%bar];\n" + WAIT, "expect_tx too small"),
    "too many bytes expected": (BAR + EXPECT.format(80) + LOAD + WAIT, "expect_tx too large"),
    "wrong parity": (BAR + EXPECT.format(64) + LOAD + WAIT + "WAIT(%bar,1)", "dead-lock"),
    "nobody arrives": (BAR + WAIT, "dead-lock"),
}


@both_timings
@pytest.mark.parametrize("name", MISUSE)
def test_misuse(name, timing):
    body, kind = MISUSE[name]
    found = finding(body, threads=1, timing=timing)
    assert found.kind == kind, str(found)


@both_timings
def test_the_second_of_two_copies_was_not_expected(timing):
    """The phase ends with the first copy: at the end 64 bytes came that nobody expected, or the second was late for its
    phase.
    """
    second = LOAD.replace("[%buffer]", "[%r1]")
    body = BAR + "add.u32 %r1, %buffer, 64;\n" + EXPECT.format(64) + LOAD + second + WAIT
    assert finding(body, threads=1, timing=timing).kind == "expect_tx too small"


def test_dead_lock_names_barrier_and_phase():
    text = str(finding(BAR + "WAIT(%bar,1)\nWAIT(%bar,0)", threads=1))
    assert "parity 0" in text and "phase 0, 1 of 1 arrivals missing" in text and "mbarrier.try_wait" in text


@pytest.mark.parametrize(
    "line",
    [
        "mbarrier.init.shared::cta.b32 [%bar], 1;",
        "mbarrier.try_wait.parity.shared::cluster.b64 %p1, [%bar], 0;",
        "mbarrier.arrive.sideways.b64 %rd1, [%rd2];",
    ],
)
def test_unsupported(line):
    found = refusal(kernel(line))
    assert found.kind == "unsupported instruction" and line.rstrip(";") in str(found)


# ---- The bytes of an mbarrier

INVAL = "mbarrier.inval.shared::cta.b64 [%bar];\n"
STORE = "cp.async.bulk.global.shared::cta.bulk_group [%a0], [%bar], 16;\ncp.async.bulk.commit_group;\n"
STORE += "cp.async.bulk.wait_group 0;\n"
ACCESSES = {
    "st": "st.shared.u32 [%bar], 0;\n",
    "st of a byte": "st.shared.u8 [%bar+7], 0;\n",
    "st, generic": "cvt.u64.u32 %rd9, %bar;\ncvta.shared.u64 %rd9, %rd9;\nst.u64 [%rd9], %rd9;\n",
    "atom": "atom.shared.add.u32 %r9, [%bar+4], 1;\n",
    "cp.async": "cp.async.ca.shared.global [%bar], [%a0], 8;\ncp.async.wait_all;\n",
    "ld": "ld.shared.u64 %rd9, [%bar];\n",
    "bulk store": "fence.proxy.async;\n" + STORE,
    "bulk load": "mbarrier.init.shared::cta.b64 [%bar2], 1;\nfence.mbarrier_init.release.cluster;\n"
    "fence.proxy.async;\nmbarrier.arrive.expect_tx.shared::cta.b64 _, [%bar2], 16;\n"
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%bar], [%a0], 16, [%bar2];\nWAIT(%bar2,0)\n",
}
ZEROS = "st.shared.v4.u32 [%bar], {%tid, %tid, %tid, %tid};\n"


@pytest.mark.parametrize("access", ACCESSES)
def test_only_mbarrier_instructions_touch_an_mbarrier(access):
    first = ZEROS + BAR
    before, after = ZEROS + ACCESSES[access], first + INVAL + ZEROS + ACCESSES[access]
    check(first + ACCESSES[access], before + "bar.sync 0;\n" + BAR, "mbarrier accessed as memory", threads=1)
    assert outcomes(after, threads=1) == {None}
    beside = ACCESSES[access].replace("[%bar", "[%buffer").replace("%rd9, %bar", "%rd9, %buffer")
    assert outcomes(ZEROS.replace("%bar", "%buffer") + BAR + beside.replace("%buffer2", "%bar2"), threads=1) == {None}


def test_what_an_mbarrier_leaves_is_not_to_be_read():
    check(ZEROS + BAR + INVAL + ACCESSES["ld"], ZEROS + BAR + INVAL + ZEROS + ACCESSES["ld"],
          "uninitialised shared memory", threads=1)  # fmt: skip


OTHERS = """
setp.ne.u32 %p0, %tid, 0;
{before}
{first}
@!%p0 mbarrier.init.shared::cta.b64 [%bar], 1;
bar.sync 0;
@!%p0 mbarrier.inval.shared::cta.b64 [%bar];
{second}
{after}
"""


def test_memory_that_becomes_an_mbarrier_and_memory_again():
    """What other threads do before its init and after its inval needs a barrier between."""
    write, read, sync = "st.shared.u32 [%bar], 5;", "ld.shared.u32 %r1, [%bar];", "bar.sync 0;"
    legal = OTHERS.format(before=write + sync + read, first=sync, second=sync, after=write)
    too_soon = OTHERS.format(before=write + sync + read, first="", second=sync, after=write)
    too_early = OTHERS.format(before=write + sync + read, first=sync, second="", after="@%p0 " + write)
    kinds = "race in shared memory", "race within a warp", "mbarrier accessed as memory"
    check(too_soon, legal, *kinds)
    check(too_early, legal, *kinds)


def test_the_text_names_the_mbarrier():
    text = str(finding(BAR + "st.shared.u8 [%bar+3], 1;", threads=1))
    assert re.search(r"writes shared address 0x(\w+)3, where an mbarrier is \(at 0x\w+0\)", text), text
