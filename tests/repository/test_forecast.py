"""The forecast of benchmarks/forecast: what it reads in machine code, its model of a multiprocessor, and that no kernel
has become slower.
"""

import pytest

from benchmarks import ops
from benchmarks.forecast import calls, kernels, layout
from benchmarks.forecast.machine import A, Multiprocessor, Role, wavefronts
from benchmarks.forecast.sass import Graph, Instruction, parse
from benchmarks.forecast.walk import Walker, Way, Work
from benchmarks.shapes import SHAPES, chosen_shapes

LISTING = """
\t\tFunction : _Z6kernelv
        /*0000*/                   S2R R0, SR_TID.X ;                          /* 0x0000000000007919 */
                                                                               /* 0x000e220000002100 */
        /*0010*/              @!P0 IADD3 R3, R1, R2, RZ ;                      /* 0x0000000201038210 */
                                                                               /* 0x001fca0007ffe0ff */
"""


def test_control_bits():
    s2r, add = parse(LISTING)["_Z6kernelv"]
    assert (s2r.opcode, s2r.operands, s2r.stall, s2r.writes, s2r.reads, s2r.waits) == (
        "S2R",
        "R0, SR_TID.X",
        1,
        0,
        7,
        0,
    )
    assert (add.predicate, add.name, add.stall, add.writes, add.waits) == ("@!P0", "IADD3", 5, 7, 1)


def code(*lines: str) -> list[Instruction]:
    """Instructions at 0x0, 0x10, ..: "[@predicate] opcode operands", which stall for a cycle and wait for nothing."""
    out = []
    for i, line in enumerate(lines):
        predicate, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        opcode, _, operands = rest.partition(" ")
        out.append(Instruction(16 * i, predicate, opcode, operands, 1, 7, 7, 0))
    return out


def addresses(way: Way, warp: int, *lines: str) -> list[int]:
    walker = Walker(Graph(code(*lines)), way, warp)
    walker.to_exit()
    return [x.address for x in walker.out]


def test_branches_on_the_thread_are_followed():
    lines = ["S2R R0, SR_TID.X", "ISETP.GE.AND P0, PT, R0, 0x20, PT", "@P0 BRA 0x40", "MUFU.EX2 R1, R1", "EXIT"]
    assert addresses(Way(), 0, *lines) == [0x0, 0x10, 0x20, 0x30, 0x40]
    assert addresses(Way(through="MUFU"), 1, *lines) == [0x0, 0x10, 0x20, 0x40]


def test_lanes_that_disagree_go_both_ways():
    lines = [
        "S2R R0, SR_TID.X",
        "LOP3.LUT R1, R0, 0x10, RZ, 0xc0, !PT",
        "ISETP.NE.AND P0, PT, R1, RZ, PT",
        "BSSY B0, 0x80",
    ]
    lines += ["@P0 BRA 0x70", "FADD R2, R2, R2", "BRA 0x80", "FMUL R2, R2, R2", "EXIT"]
    assert addresses(Way(), 3, *lines) == [0x0, 0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70, 0x80]


def executed(warp: int, *lines: str) -> list[tuple[str, int]]:
    walker = Walker(Graph(code(*lines)), Way(), warp)
    walker.to_exit()
    return [(x.opcode, x.lanes) for x in walker.out]


def test_an_access_counts_the_lanes_that_do_it():
    lines = [
        "S2R R0, SR_TID.X",
        "ISETP.GE.AND P0, PT, R0, 0x8, PT",
        "@!P0 STG.E.128 desc[UR4][R2.64], R4",
        "@P0 LDS R1, [R0]",
        "EXIT",
    ]
    assert executed(0, *lines)[2:4] == [("STG.E.128", 8), ("LDS", 24)]
    assert executed(1, *lines)[2:4] == [("NOP", 32), ("LDS", 32)]


def test_a_load_of_one_place_returns_two_registers_a_cycle():
    assert executed(0, "MOV R0, 0x10", "LDS.128 R4, [R0]", "LDS.128 R4, [R9]", "EXIT")[1:3] == [
        ("LDS.128", 16),
        ("LDS.128", 32),
    ]


@pytest.mark.parametrize("operands, value", [("R1, R0, 0x5, 0x7, PT", 7), ("R1, R0, 0x5, 0x7, !PT", 8)])
def test_minimum_and_maximum_of_a_sum(operands, value):
    lines = [
        "MOV R0, 0x3",
        f"VIADDMNMX {operands}",
        f"ISETP.EQ.AND P0, PT, R1, {value:#x}, PT",
        "@P0 BRA 0x50",
        "NOP",
        "EXIT",
    ]
    assert 0x40 not in addresses(Way(), 0, *lines)


def test_copies_that_land_take_turns_with_threads():
    stream = code("LDS.128 R4, [R1]")
    alone, _ = cycles(*[stream] * 4)
    machine = Multiprocessor()
    machine.add([Role(stream, [warp], 0, 50) for warp in range(4)])
    machine._bulk(128 * 1000, 0)
    machine.run()
    assert machine.now / 50 == pytest.approx(2 * alone, rel=0.1)


def test_tiles_of_the_recurrent_kernel():
    """As tests/kernels/test_recurrent_kernels.py finds them in the launches."""
    (two,) = chosen_shapes("2b")
    assert [kernels.recurrent_tiles(4, N, two) for N in (1, 8, 32, 64)] == [(32, 1), (64, 1), (64, 1), (64, 4)]
    assert [kernels.recurrent_tiles(2, N, two) for N in (1, 8, 16, 32)] == [(32, 1), (64, 1), (64, 2), (64, 4)]


def test_what_is_unknown_goes_the_way_that_matters():
    lines = ["LDG.E R0, desc[UR4][R2.64]", "ISETP.NE.AND P0, PT, R0, RZ, PT", "@P0 BRA 0x40", "MUFU.EX2 R1, R1", "EXIT"]
    assert 0x30 not in addresses(Way(), 0, *lines)
    assert 0x30 in addresses(Way(through="MUFU"), 0, *lines)


@pytest.mark.parametrize("start, turns", [("MOV R0, 0x3", 3), ("LDG.E R0, desc[UR4][R2.64]", 5)])
def test_loops_turn_as_their_counter_says_or_as_the_work_does(start, turns):
    lines = [
        start,
        "MUFU.EX2 R1, R1",
        "IADD3 R0, R0, -0x1, RZ",
        "ISETP.NE.AND P0, PT, R0, RZ, PT",
        "@P0 BRA 0x10",
        "EXIT",
    ]
    assert addresses(Way(loops=(Work("MUFU", 5),)), 0, *lines).count(0x10) == turns


def cycles(*streams: list[Instruction], turns: int = 50) -> tuple[float, Multiprocessor]:
    machine = Multiprocessor()
    machine.add([Role(stream, [warp], warp // 4, turns) for warp, stream in enumerate(streams)])
    machine.run()
    return machine.now / turns, machine


def test_a_chain_of_dependent_loads_takes_their_latency():
    load, use = code("LDS R0, [R1]", "FADD R1, R0, R0")
    found, _ = cycles([load._replace(writes=0), use._replace(waits=1, stall=4)])
    assert A["LDS"] <= found - 4 <= A["LDS"] + 4


def test_a_stream_of_wide_loads_is_bound_by_shared_memory():
    stream = code(*["LDS.128 R4, [R1]"] * 8)
    found, machine = cycles(*[stream] * 4)
    assert found == pytest.approx(4 * 8 * wavefronts("LDS.128"), rel=0.1)
    assert machine.busy["shared"] == pytest.approx(machine.now, rel=0.1)


def test_a_stream_of_products_is_bound_by_the_tensor_cores():
    stream = code(
        *["HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24"] * 7,
        "HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0",
    )
    found, machine = cycles(*[[*stream, *code("WARPGROUP.DEPBAR.LE gsb0, 0x1")]] * 4)
    assert found == pytest.approx(8 * 64, rel=0.1)
    assert machine.busy["tensor"] == 50 * 8 * 64


def test_a_waiting_warp_goes_on_when_the_event_has_happened():
    slow = code(*["FADD R0, R0, R0"] * 100, "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4+0x10], RZ")
    fast = code("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4+0x10], R2", "FADD R0, R0, R0")
    found, machine = cycles(slow, fast)
    assert found == pytest.approx(101, rel=0.05)
    assert machine.warps[1].waited > 0.9 * machine.now


def test_members_of_arguments_are_found(tmp_path):
    (tmp_path / "op").mkdir()
    text = "struct Inner { int64_t a, b; };\nstruct Outer {\n  int n;  // text\n  Inner inner;\n"
    text += "  bool on = false;\n  const float* p;\n"
    (tmp_path / "op" / "x.h").write_text(text + "  int get() const { return n; }\n};\n")
    first = layout.FIRST
    found = layout.constants(tmp_path, "Outer", {"n": 7, "inner.b": 5, "on": 1, "p": 0})
    assert found == {first: 7, first + 16: 5, first + 20: 0, first + 24: 1, first + 32: 0, first + 36: 0}


@pytest.mark.parametrize("us, said", [(10.5, ""), (11.5, "10.0 committed"), (8.5, "commit it"), (None, "lost")])
def test_what_has_changed_is_said(us, said):
    row = {"op": "op", "case": "op 2b 1", "kernel": "k", "us": 10.0, "limit": "lost"}
    now = row | {"us": us} if us else {name: row[name] for name in ("op", "case", "kernel", "limit")}
    found = calls.compare([now], {("op 2b 1", "k"): row})
    assert said in "".join(found) and bool(found) == bool(said)


def test_the_committed_cases_are_those_that_are_measured():
    names = {case.name for case in ops.measured(list(SHAPES))}
    assert {case for case, _ in calls.committed()} <= names


def test_no_kernel_is_slower_than_its_committed_forecast():
    """One shape: the other ones run the same kernels."""
    build = calls.here()
    if build is None:
        pytest.skip(
            "the CUDA objects are not here, or the disassembler is not: the library was built without nvcc or elsewhere"
        )
    said = calls.compare(list(calls.Forecast(build).rows(chosen_shapes("2b"))), calls.committed())
    assert not said, "\n".join(said)
