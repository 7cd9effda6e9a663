"""The generators of planted bugs and legal alterations, on the PTX of a small pipeline."""

import re

import pytest

import hoppersim
from hoppersim import mutate

HEADER = ".version 8.0\n.target sm_90a\n.address_size 64\n.extern .shared .align 128 .b8 memory[];\n"
# A producer warp and a consumer warpgroup, as nvcc writes them; what it computes is of no interest here.
PIPELINE = """.visible .entry pipeline(.param .u64 to)
.maxntid 256
{
.reg .pred %p<9>;
.reg .b32 %r<40>;
.reg .f32 %f<5>;
.reg .b64 %rd<9>;
mov.u32 %r1, memory;
mov.u32 %r2, 1;
mov.u32 %r3, %tid.x;
and.b32 %r4, %r3, 31;
mbarrier.init.shared::cta.b64 [%r1], %r2;
fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.aligned;
barrier.cluster.wait.aligned;
bar.sync 0;
setmaxnreg.dec.sync.aligned.u32 40;
setmaxnreg.inc.sync.aligned.u32 232;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], %r10;
mov.u32 %r11, 0;
mov.u32 %r12, 0;
$L__loop:
{
.reg .pred P1;
LAB_WAIT:
mbarrier.try_wait.parity.shared::cta.b64 P1, [%r1],
  %r11, %r13;
@P1 bra DONE;
bra LAB_WAIT;
DONE:
}
shl.b32 %r20, %r4, 4;
xor.b32 %r21, %r20, 112;
add.s32 %r22, %r1, %r21;
st.shared.u32 [%r22+64], %r4;
fence.proxy.async.shared::cta;
bar.sync %r14, %r15;
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %rd1, %rd2, %p1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
bar.warp.sync -1;
setp.ne.s32 %p2, %r4, 0;
@%p2 bra $L__skip;
add.s32 %r30, %r1, 64; // the empty barrier
mbarrier.arrive.shared::cta.b64 _, [%r30];
$L__skip:
xor.b32 %r11, %r11, 1;
add.s32 %r12, %r12, 1;
setp.lt.s32 %p3, %r12, 9;
@%p3 bra $L__loop;
cp.async.ca.shared.global [%r22], [%rd3], 16;
cp.async.commit_group;
cp.async.wait_group 1;
ret;
}"""
LINES = dict(enumerate(PIPELINE.split("\n"), 100))


def line_of(part: str) -> int:
    (line,) = [number for number, text in LINES.items() if part in text]
    return line


def changed(lines: dict) -> str:
    return "\n".join(lines.get(number, text) or "" for number, text in LINES.items())


def found(what: str, part: str) -> dict:
    """The lines that the one mutant changes that does ``what`` to the instruction with ``part``."""
    (mutant,) = [m for m in mutate.mutants(LINES) if m.what == what and part in m.instruction]
    assert mutant.line == line_of(part)
    return mutant.lines


def test_which_mutants_there_are():
    counted = dict.fromkeys(mutate.CLASSES, 0)
    for mutant in mutate.mutants(LINES):
        counted[mutant.kind] += 1
    assert counted == {
        "fence": 3,
        "wait": 5,
        "count": 6,
        "arrive": 4,
        "parity": 2,
        "swizzle": 6,
        "barrier": 4,
        "setmaxnreg": 3,
        "stage": 1,
        "commit": 2,
    }


@pytest.mark.parametrize(
    ("what", "part", "new"),
    [
        ("removed", "fence.proxy.async", None),
        ("removed", "fence.mbarrier_init", None),
        ("removed", "bar.warp.sync", None),
        ("removed", "wgmma.commit_group", None),
        ("one more group may be left", "wgmma.wait_group", "wgmma.wait_group.sync.aligned 1;"),
        ("one more group may be left", "cp.async.wait_group", "cp.async.wait_group 2;"),
        ("40 made 104", "setmaxnreg.dec", "setmaxnreg.dec.sync.aligned.u32 104;"),
        ("232 made 256", "setmaxnreg.inc", "setmaxnreg.inc.sync.aligned.u32 256;"),
        ("toggle removed", "xor.b32 %r11", "mov.b32 %r11, %r11;"),
        ("xor of an address removed", "xor.b32 %r21", "mov.b32 %r21, %r20;"),
        (
            "+1 arrival",
            "mbarrier.init",
            "{ .reg .b32 hs_value; mov.b32 hs_value, %r2; add.s32 hs_value, hs_value, 1; "
            "mbarrier.init.shared::cta.b64 [%r1], hs_value; }",
        ),
        (
            "doubled",
            "mbarrier.arrive.shared",
            "mbarrier.arrive.shared::cta.b64 _, [%r30]; mbarrier.arrive.shared::cta.b64 _, [%r30];",
        ),
    ],
)
def test_one_line_changes(what, part, new):
    assert found(what, part) == {line_of(part): new}


def test_the_wait_falls_through():
    lines = found("falls through", "mbarrier.try_wait")
    first = line_of("mbarrier.try_wait")
    assert lines == {first: "setp.eq.u32 P1, 0, 0;", first + 1: None}, "an instruction of two lines"


def test_the_cluster_barrier_goes_as_a_whole():
    lines = found("removed", "barrier.cluster.arrive")
    assert lines == {line_of("barrier.cluster.arrive"): None, line_of("barrier.cluster.wait"): None}


def test_a_release_moves_before_the_last_read():
    lines = found("release before the last read", "mbarrier.arrive.shared")
    assert lines == {
        line_of("mbarrier.arrive.shared"): None,
        line_of("wgmma.wait_group"): "{ .reg .b32 hs_0; .reg .pred hs_1; add.s32 hs_0, %r1, 64; "
        "setp.ne.s32 hs_1, %r4, 0; @!hs_1 mbarrier.arrive.shared::cta.b64 _, [hs_0]; } "
        "wgmma.wait_group.sync.aligned 0;",
    }


def test_every_alteration_is_ptx():
    """It parses, and it does change something; so does the trap that shows whether it is reached."""
    alterations = [*mutate.mutants(LINES), *mutate.legal(LINES)]
    assert hoppersim.Module(HEADER + PIPELINE).kernels == ["pipeline"]
    for mutant in alterations:
        for lines in (mutant.lines, mutant.reach):
            assert changed(lines) != PIPELINE, mutant
            assert len(changed(lines).split("\n")) == len(LINES), mutant
            assert hoppersim.Module(HEADER + changed(lines)).kernels == ["pipeline"], mutant
        assert "trap;" in changed(mutant.reach)


def test_legal_alterations():
    whats = {m.what for m in mutate.legal(LINES)}
    assert {
        "fence doubled",
        "fence of all spaces",
        "bar.warp.sync doubled",
        "bar.sync doubled",
        "nanosleep before",
        "wait doubled",
        "no group may be left",
        "expect_tx in two",
        "expect_tx before the arrive",
        "arrival count written out",
        "test_wait in place of try_wait",
        "registers renamed",
        "every setmaxnreg removed",
        "empty groups committed",
    } <= whats
    assert any(re.fullmatch(r"\d+ pairs of independent instructions swapped", what) for what in whats)


def test_only_independent_instructions_are_swapped():
    swapped = next(m for m in mutate.legal(LINES) if "swapped" in m.what)
    text = changed(swapped.lines)
    assert text.index("mov.u32 %r2, 1") < text.index("mov.u32 %r1, memory")
    assert text.index("shl.b32 %r20") < text.index("xor.b32 %r21") < text.index("add.s32 %r22")
    assert text.index("add.s32 %r12") < text.index("setp.lt.s32 %p3, %r12")
