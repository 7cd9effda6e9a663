"""Branches, calls, barriers, warp-synchronous instructions, scheduling, dead-locks."""

import numpy as np
import pytest
from lane_ptx import HEADER, fault_of, kernel, store
from refusal import refusal

import hoppersim


def run(body, threads=32, count=None, block=None, declare="", **options):
    out = np.zeros(count or threads, np.uint32)
    with hoppersim.simulate(**options):
        hoppersim.Module(kernel(body, declare=declare)).launch("k", 1, block or threads, (out,))
    return out


def test_special_registers():
    body = (
        "mov.u32 %r1, %tid.y;\nmov.u32 %r2, %laneid;\nmov.u32 %r3, %warpid;\nmov.u32 %r4, %ntid.x;\n"
        "mad.lo.u32 %r0, %r1, %r4, %r0;\n"
    )
    body += "shl.b32 %r3, %r3, 16;\nshl.b32 %r1, %r1, 8;\nor.b32 %r2, %r2, %r3;\nor.b32 %r2, %r2, %r1;\n" + store("%r2")
    thread = np.arange(80)
    np.testing.assert_array_equal(run(body, 80, block=(16, 5, 1)), thread % 32 | thread // 32 << 16 | thread // 16 << 8)


@pytest.mark.parametrize("seed", range(4))
def test_divergent_loop_reconverges(seed):
    body = (
        "mov.u32 %r1, 0;\nmov.u32 %r2, 0;\nLOOP:\nadd.u32 %r2, %r2, %r1;\nadd.u32 %r1, %r1, 1;\n"
        "setp.le.u32 %p1, %r1, %r0;\n@%p1 bra LOOP;\n"
    )
    body += "activemask.b32 %r3;\nsetp.eq.u32 %p2, %r3, -1;\n@!%p2 mov.u32 %r2, 0;\n" + store("%r2")
    thread = np.arange(64)
    got = run(body, 64, seed=seed)
    np.testing.assert_array_equal(got, thread * (thread + 1) // 2)


def test_branch_table_and_scoped_labels():
    body = "TABLE: .branchtargets A, B, C;\nand.b32 %r1, %r0, 3;\nmin.u32 %r1, %r1, 2;\nbrx.idx %r1, TABLE;\n"
    body += "A: mov.u32 %r2, 10;\nbra END;\nB: mov.u32 %r2, 20;\nbra END;\nC: mov.u32 %r2, 30;\nEND:\n"
    for step in (1, 2):  # the same names twice, as inline assembly produces them
        body += (
            f"{{\n.reg .pred %p1;\n.reg .b32 x;\nmov.u32 x, {step};\nsetp.gt.u32 %p1, x, 1;\n@%p1 bra DONE;\n"
            f"add.u32 %r2, %r2, x;\nDONE:\n}}\n"
        )
    thread = np.arange(32)
    np.testing.assert_array_equal(run(body + store("%r2")), np.array([10, 20, 30, 30])[thread % 4] + 1)


def test_call_of_a_function():
    function = (
        ".func (.param .b32 r) twice(.param .b32 a)\n{\n.reg .b32 %r<3>;\n.reg .pred %p<2>;\n"
        "ld.param.b32 %r1, [a];\nsetp.gt.u32 %p1, %r1, 7;\n@%p1 bra BIG;\n"
    )
    function += "shl.b32 %r1, %r1, 1;\nBIG:\nst.param.b32 [r+0], %r1;\nret;\n}\n"
    call = (
        "{\n.param .b32 p0;\nst.param.b32 [p0+0], %r1;\n.param .b32 q0;\ncall.uni (q0), twice, (p0);\n"
        "ld.param.b32 %r1, [q0+0];\n}\n"
    )
    thread = np.arange(32)
    got = run("mov.u32 %r1, %r0;\n" + call + call + store("%r1"), declare=function)
    once = np.where(thread > 7, thread, 2 * thread)
    np.testing.assert_array_equal(got, np.where(once > 7, once, 2 * once))


def test_shuffles():
    thread = np.arange(32)
    for mode, operands, expected in [
        ("bfly", "5, 31", thread ^ 5),
        ("up", "3, 0", np.where(thread >= 3, thread - 3, thread)),
        ("down", "4, 31", np.where(thread < 28, thread + 4, thread)),
        ("idx", "2, 6175", thread // 8 * 8 + 2),
    ]:
        np.testing.assert_array_equal(
            run(f"shfl.sync.{mode}.b32 %r1|%p1, %r0, {operands}, -1;\n" + store("%r1")), expected
        )


def test_votes_matches_reductions():
    thread = np.arange(32)
    head = "and.b32 %r1, %r0, 3;\nsetp.eq.u32 %p1, %r1, 1;\n"
    np.testing.assert_array_equal(
        run(head + "vote.sync.ballot.b32 %r2, %p1, -1;\n" + store("%r2")), np.full(32, 0x22222222, np.uint32)
    )
    np.testing.assert_array_equal(
        run(head + "match.any.sync.b32 %r2, %r1, -1;\n" + store("%r2")), (0x11111111 << thread % 4).astype(np.uint32)
    )
    np.testing.assert_array_equal(run("redux.sync.add.u32 %r2, %r0, -1;\n" + store("%r2")), np.full(32, 496))
    np.testing.assert_array_equal(
        run("neg.s32 %r1, %r0;\nredux.sync.min.s32 %r2, %r1, -1;\n" + store("%r2")), np.full(32, 2**32 - 31)
    )
    got = run("elect.sync %r2|%p1, -1;\nselp.u32 %r1, 1, 0, %p1;\n" + store("%r1"))
    assert got.sum() == 1


TILE = "and.b32 %r9, %r0, 24;\nmov.u32 %r8, 255;\nshl.b32 %r8, %r8, %r9;\n"  # the mask of 8 lanes


def test_tiles_of_a_warp():
    """Each lane names its own tile."""
    thread = np.arange(32)
    tile = thread // 8
    for instruction, expected in [
        ("shfl.sync.bfly.b32 %r1, %r0, 5, 6175, %r8;", thread ^ 5),
        ("redux.sync.add.u32 %r1, %r0, %r8;", 64 * tile + 28),
        ("match.any.sync.b32 %r1, %r9, %r8;", 255 << 8 * tile),
        ("setp.lt.u32 %p1, %r0, 11;\nvote.sync.ballot.b32 %r1, %p1, %r8;", np.array([255, 1792, 0, 0])[tile]),
        ("elect.sync %r1|%p1, %r8;", 8 * tile),
        ("bar.warp.sync %r8;\nmov.u32 %r1, 7;", np.full(32, 7)),
    ]:
        np.testing.assert_array_equal(run(TILE + instruction + "\n" + store("%r1")), expected.astype(np.uint32))


@pytest.mark.parametrize("seed", range(5))
def test_tiles_go_on_alone(seed):
    """Tile 0 and tile 1 come together, tile 1 without its last lane, which waits for what tile 0 does next."""
    body = """
    .shared .align 4 .b8 s[4];
    mov.u32 %r7, s;
    setp.eq.u32 %p1, %r0, 0;
    @%p1 st.shared.u32 [%r7], 0;
    bar.warp.sync -1;
    setp.eq.u32 %p2, %r0, 15;
    @%p2 bra LATE;
    SUM: redux.sync.add.u32 %r1, %r0, %r8;
    @%p1 st.release.cta.shared.u32 [%r7], 1;
    bra END;
    LATE: ld.acquire.cta.shared.u32 %r6, [%r7];
    setp.eq.u32 %p3, %r6, 0;
    @%p3 bra LATE;
    bra SUM;
    END:
    """
    np.testing.assert_array_equal(run(TILE + body + store("%r1"), seed=seed), np.arange(32) // 8 * 64 + 28)


@pytest.mark.parametrize(
    "mask, text",
    [
        ("0", "is empty"),
        ("0xff00", "the lane is not in its own mask"),
        ("%r8", "names a lane whose own mask is another"),
    ],
)
def test_masks_that_cannot_be(mask, text):
    body = TILE + "setp.eq.u32 %p1, %r0, 3;\n@%p1 mov.u32 %r8, 15;\n" + f"redux.sync.add.u32 %r1, %r0, {mask};\n"
    with pytest.raises(hoppersim.Fault, match=f"^member mask: {text}"):
        run(body + store("%r1"))


def test_a_function_that_calls_itself_is_refused():
    function = (
        ".func (.param .b32 r) again(.param .b32 a)\n{\n.reg .b32 %r<3>;\nld.param.b32 %r1, [a];\n"
        + 3 * "{\n.param .b32 p0;\nst.param.b32 [p0+0], %r1;\n.param .b32 q0;\ncall.uni (q0), again, (p0);\n}\n"
        + "st.param.b32 [r+0], %r1;\nret;\n}\n"
    )
    call = "{\n.param .b32 p0;\nst.param.b32 [p0+0], %r0;\n.param .b32 q0;\ncall.uni (q0), again, (p0);\n}\n"
    with pytest.raises(hoppersim.Fault, match="^unsupported instruction: .*recursive call"):
        run(call + store("%r0"), declare=function)


def test_members_wait_for_divergent_lanes():
    body = (
        "mov.u32 %r1, 1;\nsetp.lt.u32 %p1, %r0, 9;\n@%p1 bra SLOW;\nbra SUM;\nSLOW:\nmov.u32 %r1, 2;\nSUM:\n"
        "redux.sync.add.u32 %r2, %r1, -1;\n"
    )
    np.testing.assert_array_equal(run(body + store("%r2")), np.full(32, 41))


@pytest.mark.parametrize("seed", range(5))
def test_barrier_orders_shared_memory(seed):
    body = (
        "mov.u32 %r1, s;\nshl.b32 %r2, %r0, 2;\nadd.u32 %r3, %r1, %r2;\nst.shared.u32 [%r3], %r0;\nbar.sync 0;\n"
        "xor.b32 %r4, %r2, 508;\nadd.u32 %r4, %r1, %r4;\nld.shared.u32 %r5, [%r4];\n"
    )
    got = run(".shared .align 4 .b8 s[512];\n" + body + store("%r5"), 128, seed=seed)
    np.testing.assert_array_equal(got, np.arange(128) ^ 127)


@pytest.mark.parametrize("seed", range(5))
def test_producer_arrives_consumer_syncs(seed):
    body = (
        ".shared .align 4 .b8 s[128];\nmov.u32 %r1, s;\nand.b32 %r2, %r0, 31;\nshl.b32 %r2, %r2, 2;\n"
        "add.u32 %r1, %r1, %r2;\nsetp.ge.u32 %p1, %r0, 32;\n@%p1 bra CONSUMER;\n"
    )
    body += (
        (
            "st.shared.u32 [%r1], %r0;\nbar.arrive 3, 64;\nbra END;\nCONSUMER:\nbar.sync 3, 64;\n"
            "ld.shared.u32 %r3, [%r1];\n"
        )
        + store("%r3")
        + "END:\n"
    )
    np.testing.assert_array_equal(run(body, 64, seed=seed)[32:], np.arange(32))


def test_barrier_reduction():
    body = (
        "setp.lt.u32 %p1, %r0, 37;\nbar.red.popc.u32 %r1, 0, %p1;\nbar.red.or.pred %p2, 0, %p1;\n"
        "@!%p2 mov.u32 %r1, 0;\n"
    )
    np.testing.assert_array_equal(run(body + store("%r1"), 96), np.full(96, 37))


def test_exited_warps_do_not_hold_a_barrier():
    body = "setp.ge.u32 %p1, %r0, 64;\n@%p1 bra END;\nbar.sync 0;\nmov.u32 %r1, 5;\n" + store("%r1") + "END:\n"
    np.testing.assert_array_equal(run(body, 128), [5] * 64 + [0] * 64)


def test_divergent_barrier_is_a_fault():
    body = "setp.lt.u32 %p1, %r0, 16;\n@!%p1 bra END;\nbar.sync 0;\nEND:\n"
    assert fault_of(kernel(body), (np.zeros(32, np.uint32),)).kind == "divergent aligned instruction"
    body = "setp.lt.u32 %p1, %r0, 16;\n@%p1 bra A;\nbar.sync 0;\nbra END;\nA:\nbar.sync 0;\nEND:\n"
    assert fault_of(kernel(body), (np.zeros(32, np.uint32),)).kind == "divergent aligned instruction"
    body = "setp.lt.u32 %p1, %r0, 16;\n@%p1 bar.sync 0;\n"
    assert fault_of(kernel(body), (np.zeros(32, np.uint32),)).kind == "divergent aligned instruction"


def test_dead_lock_report():
    body = "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra A;\nbar.sync 1, 64;\nbra END;\nA:\nbar.sync 2, 64;\nEND:\n"
    fault = fault_of(kernel(body), (np.zeros(64, np.uint32),), block=64)
    text = str(fault)
    assert fault.kind == "dead-lock"
    assert (
        "warp 0, lanes 0xffffffff" in text
        and "waits for barrier 2" in text
        and "bar.sync 1, 64" in text
        and "barrier 1: 32 threads arrived of 64" in text
    )


def test_live_lock():
    fault = fault_of(kernel("LOOP:\nbra LOOP;\n"), (np.zeros(32, np.uint32),), max_instructions=100000)
    assert fault.kind == "live-lock"
    text = str(fault)
    assert "--max-instructions) above 100000" in text and "CTA (0, 0, 0), warp 0, lanes 0xffffffff" in text


POLL = "ld.volatile.global.u32 %r1, [%rd0];\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 bra LOOP;\n"
TRY_A_LOCK = "atom.global.cas.b32 %r1, [%rd0], 1, 2;\nsetp.ne.u32 %p1, %r1, 1;\n@%p1 bra LOOP;\n"


@pytest.mark.parametrize("look", [POLL, TRY_A_LOCK, "nanosleep.u32 20;\n" + POLL])
@pytest.mark.parametrize("seed", [0, 1])
def test_waiting_for_what_never_comes_is_a_live_lock(look, seed):
    fault = fault_of(kernel("LOOP:\n" + look), (np.zeros(32, np.uint32),), max_instructions=20000, seed=seed)
    assert fault.kind == "live-lock" and "without one that stores" in str(fault)


@pytest.mark.parametrize("seed", [0, 1])
def test_work_is_no_live_lock(seed):
    """Ten times the limit, with a store in each turn of the loop; and a second warp that polls until it is over."""
    work = (
        "mov.u32 %r1, 0;\nWORK:\nst.global.u32 [%rd0+64], %r1;\nadd.u32 %r1, %r1, 1;\n"
        "setp.lt.u32 %p1, %r1, 50000;\n@%p1 bra WORK;\nmov.u32 %r1, 1;\nst.global.u32 [%rd0], %r1;\nbra END;\n"
    )
    body = "setp.ge.u32 %p2, %r0, 32;\n@%p2 bra LOOP;\n" + work + "LOOP:\n" + POLL + "END:\n"
    y = np.zeros(32, np.uint32)
    with hoppersim.simulate(max_instructions=20000, seed=seed):
        counters = hoppersim.Module(kernel(body)).launch("k", 1, 64, (y,))
    assert counters["warp_instructions"] > 200000 and y[0] == 1


@pytest.mark.parametrize(
    "cluster, name", [(1, "CTA (3, 0, 0), warp"), (2, "CTA (3, 0, 0), rank 1 of its cluster, warp")]
)
def test_one_name_of_a_cta(cluster, name):
    body = "mov.u32 %r1, %ctaid.x;\nsetp.eq.u32 %p1, %r1, 3;\n@%p1 trap;\n"
    with pytest.raises(hoppersim.Fault) as caught:
        hoppersim.Module(kernel(body)).launch("k", 4, 32, (np.zeros(32, np.uint32),), cluster=(cluster, 1, 1))
    assert caught.value.kind == "trap" and name in str(caught.value)


def test_spinning_lane_lets_the_others_run():
    """Lane 0 spins at a lower pc than the code that releases it."""
    body = (
        ".shared .align 4 .b8 s[4];\nmov.u32 %r1, s;\nmov.u32 %r2, 0;\nst.shared.u32 [%r1], %r2;\n"
        "setp.eq.u32 %p1, %r0, 0;\n@!%p1 bra SET;\n"
    )
    body += (
        "SPIN:\nld.volatile.shared.u32 %r3, [%r1];\nsetp.eq.u32 %p2, %r3, 0;\n@%p2 bra SPIN;\nbra END;\nSET:\n"
        "mov.u32 %r3, 7;\nst.volatile.shared.u32 [%r1], %r3;\nEND:\n"
    )
    np.testing.assert_array_equal(run(body + store("%r3")), np.full(32, 7))


def test_trap_and_exit():
    assert fault_of(kernel("trap;"), (np.zeros(32, np.uint32),)).kind == "trap"
    body = "mov.u32 %r1, 1;\nsetp.lt.u32 %p1, %r0, 5;\n@%p1 exit;\n" + store("%r1")
    np.testing.assert_array_equal(run(body), [0] * 5 + [1] * 27)


def test_register_limits():
    assert run("setmaxnreg.dec.sync.aligned.u32 40;\nsetmaxnreg.inc.sync.aligned.u32 232;\n").sum() == 0
    assert refusal(kernel("setmaxnreg.dec.sync.aligned.u32 41;")).kind == "unsupported instruction"
    assert (
        fault_of(
            kernel("setmaxnreg.dec.sync.aligned.u32 40;\nsetmaxnreg.inc.sync.aligned.u32 24;\n"),
            (np.zeros(32, np.uint32),),
        ).kind
        == "setmaxnreg"
    )


def test_grid_coordinates_and_counters():
    text = HEADER + (
        ".visible .entry k(.param .u64 out)\n{\n.reg .b32 %r<9>;\n.reg .b64 %rd<4>;\n"
        "ld.param.u64 %rd0, [out];\nmov.u32 %r0, %ctaid.x;\nmov.u32 %r1, %ctaid.y;\nmov.u32 %r2, %nctaid.x;\n"
    )
    text += (
        "mad.lo.u32 %r3, %r1, %r2, %r0;\nmul.wide.u32 %rd1, %r3, 4;\nadd.s64 %rd1, %rd0, %rd1;\n"
        "red.global.add.u32 [%rd1], %r3;\nret;\n}\n"
    )
    out = np.zeros(21, np.uint32)
    counters = hoppersim.Module(text).launch("k", (7, 3), 32, (out,))
    np.testing.assert_array_equal(out, 32 * np.arange(21))
    assert (
        counters["instructions"]["red.global"] == 21
        and counters["instructions"]["control"] == 21
        and counters["warp_instructions"] == 9 * 21
    )
