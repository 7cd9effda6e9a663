"""setmaxnreg: its rules, and the pool of registers of a CTA."""

import numpy as np
import pytest
from async_ptx import both_timings
from lane_ptx import HEADER
from refusal import refusal

import hoppersim

seeds = pytest.mark.parametrize("seed", range(10))
BOUND = ".maxntid 384, 1, 1\n.minnctapersm 1\n"  # 65536 / 384: 168 registers per thread


def source(bodies: list[str], bound: str = BOUND) -> str:
    """Each warpgroup runs its body, then writes its number."""
    jumps = "".join(f"setp.lt.u32 %p1, %r0, {128 * (n + 1)};\n@%p1 bra G{n};\n" for n in range(len(bodies)))
    groups = "".join(f"G{n}:\n{body}\nmov.u32 %r1, {n + 1};\nbra END;\n" for n, body in enumerate(bodies))
    return (
        HEADER
        + f".visible .entry k(.param .u64 out)\n{bound}{{\n.reg .pred %p<4>;\n.reg .b32 %r<4>;\n.reg .b64 %rd<4>;\n"
        "ld.param.u64 %rd0, [out];\nmov.u32 %r0, %tid.x;\n" + jumps + groups + "END:\nmul.wide.u32 %rd1, %r0, 4;\n"
        "add.s64 %rd1, %rd0, %rd1;\nst.global.b32 [%rd1], %r1;\nret;\n}\n"
    )


def run(bodies: list[str], bound: str = BOUND, **options) -> None:
    out = np.zeros(128 * len(bodies), np.uint32)
    with hoppersim.simulate(**options):
        hoppersim.Module(source(bodies, bound)).launch("k", 1, out.size, (out,))
    assert (out == np.arange(out.size) // 128 + 1).all()


def fault(bodies: list[str], bound: str = BOUND, **options) -> "hoppersim.Fault":
    with pytest.raises(hoppersim.Fault) as caught:
        run(bodies, bound, **options)
    return caught.value


def dec(count: int) -> str:
    return f"setmaxnreg.dec.sync.aligned.u32 {count};\n"


def inc(count: int) -> str:
    return f"setmaxnreg.inc.sync.aligned.u32 {count};\n"


def specialised(down: int, up: int, releases: int = 0) -> list[str]:
    bodies = [inc(up)] * 3
    bodies[releases] = dec(down)
    return bodies


@both_timings
@seeds
@pytest.mark.parametrize("releases", [0, 2])
@pytest.mark.parametrize("down, up", [(40, 232), (24, 240)])
def test_what_one_warpgroup_releases_the_others_take(down, up, releases, timing, seed):
    run(specialised(down, up, releases), timing=timing, seed=seed)


@both_timings
@seeds
@pytest.mark.parametrize("releases", [0, 2])
def test_more_than_the_pool(releases, timing, seed):
    """3 * 168 = 504 registers; 40 + 2 * 240 = 520."""
    found = fault(specialised(40, 240, releases), timing=timing, seed=seed)
    assert found.kind == "setmaxnreg pool exhausted"
    text = str(found)
    # One warpgroup has taken 4 * 72 of the 4 * 128, the other lacks as much.
    assert "lacks 288 registers" in text and "the pool has 224" in text, text
    assert "12 warps of 168 (the most that the launch bound allows)" in text and "2016 together" in text
    assert f"warp {4 * releases} 40 (ended)" in text and "setmaxnreg.inc.sync.aligned.u32 240" in text


@both_timings
@seeds
def test_nobody_releases(timing, seed):
    found = fault(["", inc(232), inc(232)], timing=timing, seed=seed)
    assert found.kind == "setmaxnreg pool exhausted" and "the pool has 0" in str(found)


@both_timings
@seeds
def test_the_declared_number_of_ctas_shares_the_registers(timing, seed):
    """Two CTAs: 80 registers per thread."""
    two = BOUND.replace("minnctapersm 1", "minnctapersm 2")
    options = {"timing": timing, "seed": seed}
    assert fault(specialised(40, 232), two, **options).kind == "setmaxnreg pool exhausted"
    run(specialised(40, 96), two, **options)  # 40 + 2 * 96 = 232 of 240
    assert fault(specialised(40, 104), two, **options).kind == "setmaxnreg pool exhausted"


@both_timings
@seeds
def test_declared_registers(timing, seed):
    options = {"timing": timing, "seed": seed}
    declared = ".maxntid 384, 1, 1\n.maxnreg 128\n"
    run(specialised(24, 176), declared, **options)  # 24 + 2 * 176 = 376 of 384
    found = fault(specialised(24, 184), declared, **options)
    assert found.kind == "setmaxnreg pool exhausted" and "12 warps of 128 registers" in str(found)
    assert fault([dec(136), "", ""], declared, **options).kind == "setmaxnreg"
    assert fault([inc(120), "", ""], declared, **options).kind == "setmaxnreg"
    run([inc(120), "", ""], **options)  # the launch bound says at most 168: it may have been less


@both_timings
@seeds
def test_an_inc_waits_for_a_later_dec(timing, seed):
    """The releasing warpgroup spins first."""
    spin = "mov.u32 %r2, 0;\nSPIN: add.u32 %r2, %r2, 1;\nsetp.lt.u32 %p2, %r2, 3000;\n@%p2 bra SPIN;\n"
    run([spin + dec(24), inc(240), inc(240)], timing=timing, seed=seed)


@both_timings
@seeds
def test_a_barrier_before_the_dec_is_a_dead_lock_of_another_kind(timing, seed):
    """The pool would be filled, but its filler waits for a warpgroup that waits for the pool."""
    found = fault(["bar.sync 1, 256;\n" + dec(24), inc(240) + "bar.sync 1, 256;\n", inc(240)], timing=timing, seed=seed)
    assert found.kind == "dead-lock" and "waits for 240 registers per thread" in str(found)
    run([dec(24) + "bar.sync 1, 256;\n", inc(240) + "bar.sync 1, 256;\n", inc(240)], timing=timing, seed=seed)


@both_timings
@seeds
def test_the_whole_warpgroup_executes_the_same(timing, seed):
    options = {"timing": timing, "seed": seed}
    half = "setp.lt.u32 %p2, %r0, 64;\n"
    assert fault([half + "@%p2 bra S;\n" + dec(40) + "S:\n", "", ""], **options).kind == "setmaxnreg"
    other = half + "@%p2 bra S;\n" + dec(40) + "bra T;\nS:\n" + dec(48) + "T:\n"
    assert fault([other, "", ""], **options).kind == "setmaxnreg"
    run([other.replace("48", "40"), "", ""], **options)  # two places, the same instruction


def test_without_a_declared_bound():
    """ptxas ignores setmaxnreg then; the warps may have what the multiprocessor has."""
    run(specialised(40, 232), bound="")
    assert fault(specialised(40, 240), bound="").kind == "setmaxnreg pool exhausted"


KERNEL = """
template <int kUp>
__global__ void __launch_bounds__(384, 1) specialised(int* out) {
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    out[threadIdx.x] = 1;
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kUp));
    out[threadIdx.x] = 2;
  }
}
extern "C" int fits(int* out) { return specialised<232><<<1, 384>>>(out), cudaGetLastError(); }
extern "C" int exceeds(int* out) { return specialised<240><<<1, 384>>>(out), cudaGetLastError(); }
"""


@both_timings
def test_with_the_compilers_report(timing):
    library, out = hoppersim.compile_cuda(KERNEL), np.zeros(384, np.int32)
    for known in (False, True):
        if known:
            library.use_compiler_report()
        with hoppersim.simulate(timing=timing):
            assert library.call("fits", out) == 0 and out.sum() == 128 + 512
            with pytest.raises(hoppersim.Fault, match="setmaxnreg pool exhausted") as caught:
                library.call("exceeds", out)
    assert "12 warps of 168 registers" in str(caught.value)  # as ptxas says, too


def test_counts_outside_of_the_rules():
    for count in (16, 41, 264):
        assert "multiple of 8" in str(refusal(source([dec(count)])))
