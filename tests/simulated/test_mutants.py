"""Bugs planted in the library's kernels at the level of PTX: one of each class is noticed, legal alterations are not.

`python -m tests.simulated.mutants` is the whole campaign.
"""

import re

import pytest
from mutants import campaign
from mutants.calls import calls
from mutants.children import Lost, in_children
from mutants.report import markdown
from support.jet_sim import jet_sim
from support.paths import ROOT

import hoppersim
from hoppersim import mutate

# Class: kernel, what is done, a part of the instruction. The first such mutant must be noticed in one default run.
PLANTED = {
    "fence": ("chunk_prepare", "removed", "fence.proxy.async"),
    "wait": ("chunk_sweep", "falls through", "mbarrier.try_wait"),
    "count": ("chunk_sweep", "-16 bytes", "expect_tx"),
    "arrive": ("chunk_sweep", "removed", "mbarrier.arrive"),
    "parity": ("chunk_sweep", "flipped", "mbarrier.try_wait"),
    "swizzle": ("chunk_prepare", "mode of descriptor B", "wgmma.mma_async"),
    "barrier": ("chunk_sweep", "removed", "bar.sync %r"),
    "setmaxnreg": ("chunk_sweep", "removed", "setmaxnreg.dec"),
    "stage": ("chunk_sweep", "release before the last read", "mbarrier.arrive"),
    "commit": ("chunk_sweep", "removed", "wgmma.commit_group"),
}
LEGAL = (
    ("chunk_sweep", "wait doubled"),
    ("chunk_sweep", "expect_tx in two"),
    ("chunk_sweep", "nanosleep before"),
    ("chunk_sweep", "registers renamed"),
    ("chunk_prepare", "bar.sync doubled"),
    ("chunk_prepare", "fence of all spaces"),
)

pytestmark = pytest.mark.kernels  # last: simulated memory stays under torch for the rest of the process


@pytest.fixture(scope="module")
def kernels() -> dict[str, campaign.Target]:
    """By the part of the name that the tables above use."""
    jet_sim()
    found = campaign.targets({"chunk": calls()["chunk"]}, ("chunk_sweep", "chunk_prepare"))
    return {part: next(t for t in found if part in t.kernel) for part in ("chunk_sweep", "chunk_prepare")}


def altered(kernel: campaign.Target, generate, what: str, part: str = "") -> mutate.Mutant:
    lines = hoppersim.ptx_of(kernel.kernel)
    return next(m for m in generate(lines) if m.what == what and part in m.instruction)


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_bug_is_noticed(kernels, kind):
    name, what, part = PLANTED[kind]
    mutant = altered(kernels[name], mutate.mutants, what, part)
    assert mutant.kind == kind
    outcome = campaign.examine(kernels[name], mutant, [("early", 0)])
    assert outcome.state == "noticed" and outcome.run == 0 and outcome.by != "ptx syntax", outcome


@pytest.mark.parametrize(("name", "what"), LEGAL)
def test_a_legal_alteration_is_not(kernels, name, what):
    mutant = altered(kernels[name], mutate.legal, what)
    for timing, seed in (("early", 0), ("late", 1)):
        assert campaign.notice(kernels[name], mutant.lines, timing, seed) == ""


def test_every_class_has_a_planted_bug():
    assert set(PLANTED) == set(mutate.CLASSES)


def test_what_no_call_reaches_does_not_count(kernels):
    """No change stands for a change without effect, no trap for a trap behind a branch that is never taken."""
    kernel = kernels["chunk_prepare"]
    mutant = altered(kernel, mutate.mutants, "removed", "bar.sync")
    never = mutant._replace(lines={}, reach={})
    assert campaign.examine(kernel, never, [("early", 0), ("late", 0)]).state == "not reached"
    assert campaign.examine(kernel, mutant._replace(lines={}), [("early", 0)]).state == "escaped"


def test_the_choice_is_spread_and_stays_the_same(kernels):
    pairs = [(t.kernel, m.kind, m.line, m.what) for t, m in campaign.chosen(list(kernels.values()), ())]
    assert pairs == [(t.kernel, m.kind, m.line, m.what) for t, m in campaign.chosen(list(kernels.values()), ())]
    classes = len({kind for _, kind, *_ in pairs})
    assert classes == len(mutate.CLASSES) == len({kind for _, kind, *_ in pairs[:classes]})
    assert len({kernel for kernel, *_ in pairs[: 2 * classes]}) == 2
    assert len(pairs) == len(set(pairs))


def test_children_that_crash_or_hang_are_lost():
    import os
    import time

    def work(task):
        if task == "crash":
            os._exit(3)
        if task == "hang":
            time.sleep(60)
        return task.upper()

    answers = dict(in_children(work, ["a", "crash", "hang", "b"], jobs=2, seconds=3.0))
    assert answers["a"] == "A" and answers["b"] == "B"
    assert isinstance(answers["crash"], Lost) and "status 3" in str(answers["crash"])
    assert isinstance(answers["hang"], Lost) and "too long" in str(answers["hang"])


def test_the_report_counts():
    about = ("kernel<64>", "fence", "removed", 7, "fence.proxy.async")
    outcomes = [
        campaign.Outcome(*about, "noticed", 0, "missing proxy fence"),
        campaign.Outcome(*about, "noticed", 3, "results differ"),
        campaign.Outcome(*about, "escaped"),
        campaign.Outcome(*about, "not reached"),
        campaign.Outcome(*about, "equivalent", None, "nobody reads it"),
    ]
    legal = [campaign.Outcome("kernel<64>", "legal", "fence doubled", 7, "fence.proxy.async", "escaped")]
    text = markdown(outcomes, legal, 10)
    assert "| fence | 1 of 3 (33.3%) | 2 of 3 (66.7%) | 1 | 1 |" in text
    assert "nobody reads it" in text and "1 of 1 (100.0%) passed unnoticed" in text


def test_the_readme_has_the_numbers_of_the_last_campaign():
    found = re.search(r"\| all \| (\d+) of (\d+) ", (ROOT / "tests" / "simulated" / "mutants.md").read_text())
    said = re.search(r"of (\d+) bugs planted in our kernels it notices\s+(\d+)", (ROOT / "README.md").read_text())
    assert found.groups() == said.groups()[::-1]
