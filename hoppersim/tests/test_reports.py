"""What is done with a report: its severity, kinds that are allowed, warnings as errors, launches that go on."""

import re
from pathlib import Path

import numpy as np
import pytest
from async_ptx import both_timings, kernel

import hoppersim

SOURCES = Path(__file__).parents[1] / "src"
HAZARDS = Path(__file__).parents[1] / "docs" / "hazards.md"
seeds = pytest.mark.parametrize("seed", range(10))

STORE = """
st.shared.u32 [%buffer], %tid;
st.shared.u32 [%buffer+4], %tid;
st.shared.u32 [%buffer+8], %tid;
st.shared.u32 [%buffer+12], %tid;
fence.proxy.async;
cp.async.bulk.global.shared::cta.bulk_group [%a0], [%buffer], 16;
cp.async.bulk.commit_group;
"""
WAIT = "cp.async.bulk.wait_group.read 0;\n"
# Three kinds: never written, written without a fence and read by the copy engine, not waited for.
THREE = (
    "ld.shared.u32 %r1, [%buffer+64];\n" + STORE.replace("fence.proxy.async;\n", "") + "st.global.u32 [%a0+16], 5;\n"
)


def run(body: str, *, threads: int = 1, grid: int = 1, out=None, **options) -> np.ndarray:
    out = np.full(8, 7, np.uint32) if out is None else out
    with hoppersim.simulate(**options):
        kernel(body).launch("k", grid, threads, (out,))
    return out


def fault(body: str, **options) -> "hoppersim.Fault":
    with pytest.raises(hoppersim.Fault) as caught:
        run(body, **options)
    return caught.value


@both_timings
@seeds
def test_a_warning_does_not_stop_the_launch(timing, seed):
    out = run(STORE, timing=timing, seed=seed)
    assert out.tolist() == [0] * 4 + [7] * 4  # the store is still done
    (report,) = hoppersim.reports()
    line = report["line"]
    assert (
        report.pop("text").startswith("exit with a copy in flight: ")
        and f"ptx line {line}" in fault(STORE, strict=True).args[0]
    )
    assert report == {
        "kind": "exit with a copy in flight",
        "severity": "warning",
        "kernel": "k",
        "mangled": "k",
        "source": None,
        "line": line,
        "instruction": "cp.async.bulk.global.shared::cta.bulk_group [%a0], [%buffer], 16",
        "cta": (0, 0, 0),
        "warp": 0,
        "lane": 0,
        "count": 1,
    }


@both_timings
@seeds
def test_waiting_is_not_reported(timing, seed):
    run(STORE + WAIT, timing=timing, seed=seed, strict=True)
    assert hoppersim.reports() == []


@both_timings
def test_a_warning_as_an_error(timing):
    for options in ({"strict": True}, {"warn_as_error": ["exit with a copy in flight"]}):
        found = fault(STORE, timing=timing, **options)
        assert found.kind == "exit with a copy in flight" and [r["kind"] for r in found.reports] == [found.kind]
        assert hoppersim.reports() == found.reports and found.reports[0]["severity"] == "error"
    run(STORE, timing=timing, warn_as_error=["missing proxy fence"])


@both_timings
@seeds
def test_an_allowed_kind_is_not_reported(timing, seed):
    options = {"timing": timing, "seed": seed, "strict": True}
    run(STORE, allow=["exit with a copy in flight"], **options)
    assert hoppersim.reports() == []
    fenceless = STORE.replace("fence.proxy.async;\n", "") + WAIT
    assert fault(fenceless, **options).kind == "missing proxy fence"
    assert run(fenceless, allow="missing proxy fence", **options)[0] == 0
    assert hoppersim.reports() == []


def test_unknown_kinds_are_refused():
    for option in ("allow", "warn_as_error"):
        with pytest.raises(ValueError, match="no kind .*'no such kind'.*missing proxy fence.*dead-lock"):
            with hoppersim.simulate(**{option: ["no such kind"]}):
                pass
    with pytest.raises(ValueError, match="cannot go on after .*dead-lock"):
        with hoppersim.simulate(allow=["dead-lock"]):
            pass


@both_timings
@seeds
def test_go_on_collects_every_kind_and_line_once(timing, seed):
    out = np.zeros(8, np.uint32)
    with pytest.raises(hoppersim.Fault) as caught:
        # the CTAs store to the same bytes
        allow = "race in global memory"
        with hoppersim.simulate(timing=timing, seed=seed, go_on=True, host_threads=1, allow=allow):
            kernel(THREE).launch("k", 3, 1, (out,))
            assert out[4] == 5  # it ran to its end
            at_the_end = hoppersim.reports()
    kinds = ["uninitialised shared memory", "missing proxy fence", "exit with a copy in flight"]
    assert [r["kind"] for r in at_the_end] == kinds
    assert [r["count"] for r in at_the_end][0] == 3  # one in each CTA
    assert caught.value.reports == at_the_end[:2] and caught.value.kind == kinds[0]
    assert str(caught.value) == at_the_end[0]["text"]
    assert [r["line"] for r in at_the_end] == sorted(r["line"] for r in at_the_end)


def test_go_on_without_a_finding():
    run(STORE + WAIT, go_on=True)
    assert hoppersim.reports() == []


@both_timings
def test_go_on_ends_with_what_leaves_no_defined_state(timing):
    found = fault(THREE + "st.global.u32 [%a0+4096], 5;\n", timing=timing, go_on=True)
    assert found.kind == "out-of-bounds global"
    assert {r["kind"] for r in found.reports} >= {"uninitialised shared memory", "out-of-bounds global"}


def test_go_on_tells_what_was_found_when_the_results_are_wrong():
    with pytest.raises(hoppersim.Fault, match="uninitialised") as caught:
        with hoppersim.simulate(go_on=True):
            kernel(THREE).launch("k", 1, 1, (np.zeros(8, np.uint32),))
            raise AssertionError("the results differ")
    assert isinstance(caught.value.__cause__, AssertionError)


SOURCE = """
__global__ void copy(int* to) {
  __shared__ int word[2];
  if (to[0] == 0) word[0] = 1;
  to[1] = word[threadIdx.x];
}
extern "C" int run(int* to) {
  for (int n = 0; n < 2; ++n) copy<<<1, 2>>>(to);
  return cudaDeviceSynchronize();
}
"""


def test_go_on_through_the_runtime():
    """Launches of host code succeed, and the end of the block raises."""
    library = hoppersim.compile_cuda(SOURCE)
    with pytest.raises(hoppersim.Fault) as caught:
        with hoppersim.simulate(go_on=True):
            assert library.call("run", np.zeros(2, np.int32)) == 0
            assert len(hoppersim.launches()) == 2
    (report,) = caught.value.reports
    assert report["kind"] == "uninitialised shared memory" and report["count"] == 2 and report["lane"] == 1


def test_the_document_lists_the_kinds():
    rows = re.findall(r"^\| `([^`]+)` \| (error|warning)(, goes on)? \| (.+) \|$", HAZARDS.read_text(), re.M)
    expected = [(name, k.severity, ", goes on" * k.goes_on, k.meaning) for name, k in hoppersim.KINDS.items()]
    assert rows == expected


def test_the_sources_report_the_kinds():
    """Every kind that the sources name is listed, and is reported as what its entry says: a fault, or a report."""
    named = {}
    for path in [*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]:
        for call, kind in re.findall(
            r'\b([Ff]ault(?:_in)?|report|miscounted)\(\s*(?:[^"();]*\?\s*)?"([a-z][^"]*)"', path.read_text()
        ):
            named.setdefault(kind, set()).add(call == "report")
    assert {kind: {k.goes_on} for kind, k in hoppersim.KINDS.items() if kind in named} == named
    # Arguments that a condition chooses, a constant.
    elsewhere = {"device assertion", "live-lock", "dead-lock", "unsupported runtime call"}
    assert set(hoppersim.KINDS) - set(named) <= elsewhere
