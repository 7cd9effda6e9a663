"""Chooses mutants of the kernels that the calls launch, and runs each until it is noticed."""

import contextlib
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

import hoppersim
from hoppersim import mutate

from .calls import Call
from .children import Lost, in_children
from .known import EQUIVALENT, ESCAPES, reason

TOLERANCE = 1e-2  # of results, relative to the element or to the RMS of its tensor
PATIENCE = 20  # times the instructions of the kernel as it is: more is a live-lock
SECONDS = 900  # of a mutant in all its schedules; loaded machines are slow


class Use(NamedTuple):
    """A call that launches a kernel."""

    call: Call
    expected: dict[str, np.ndarray]
    instructions: int  # of the kernel's largest launch


class Target(NamedTuple):
    """A kernel, and the calls that launch it, the smallest first."""

    kernel: str  # mangled
    name: str  # as people write it
    uses: list[Use]


class Outcome(NamedTuple):
    """``run``: of the run that noticed, 0 is the default one; None if none did. ``by``: the kind of the Fault, or
    "results differ". ``state``: "noticed", "escaped", "not reached", "equivalent" or "lost".
    """

    kernel: str
    kind: str
    what: str
    line: int
    instruction: str
    state: str
    run: int | None = None
    by: str = ""


def readable(kernel: str) -> str:
    """A demangled name without namespaces, casts and arguments."""
    name = re.sub(r"\([\w:]+\)(?=\d)|jet::hopper::|jet::|\(anonymous namespace\)::", "", kernel)
    return re.sub(r"\(.*\)$| (?=>)", "", name)


def targets(calls: dict[str, Call], wanted: Sequence[str] = ()) -> list[Target]:
    """Every kernel that the calls launch; those that a part of ``wanted`` is in the name of."""
    found: dict[str, Target] = {}
    for call in calls.values():
        with hoppersim.simulate(host_threads=1, strict=True):
            expected = call.results()
        sizes: Counter = Counter()
        for record in hoppersim.launches():
            key = record["mangled"], record["kernel"]
            sizes[key] = max(sizes[key], record["counters"]["warp_instructions"])
        for (kernel, name), size in sizes.items():
            if call.kernel in kernel and (not wanted or any(part in kernel for part in wanted)):
                target = found.setdefault(kernel, Target(kernel, readable(name), []))
                target.uses.append(Use(call, expected, size))
    for target in found.values():
        target.uses.sort(key=lambda use: use.instructions)
    return list(found.values())


def schedules(seeds: int) -> list[tuple[str, int]]:
    """The default run first."""
    return [("early", 0), ("late", 0), *((timing, seed) for seed in range(1, seeds) for timing in ("early", "late"))]


def notice(target: Target, lines: dict[int, str | None], timing: str, seed: int) -> str:
    """The kind of what a run of the altered kernel reports, or "results differ", or nothing. A run is of each call
    until one notices.
    """
    with hoppersim.edited(target.kernel, lines):
        for use in target.uses:
            limit = PATIENCE * use.instructions + 1_000_000
            options = dict(timing=timing, seed=seed, host_threads=1, max_instructions=limit, strict=True)
            try:
                with hoppersim.simulate(**options):
                    found = use.call.results()
            except hoppersim.Fault as fault:
                return fault.kind
            if differ(found, use.expected):
                return "results differ"
    return ""


def differ(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    """Beyond rounding."""
    for name, right in expected.items():
        scale = np.sqrt(np.mean(right.astype(np.float64) ** 2)) + np.abs(right)
        if not (np.abs(found[name] - right) <= TOLERANCE * scale + 1e-30).all():
            return True
    return False


def examine(target: Target, mutant: mutate.Mutant, runs: Sequence[tuple[str, int]]) -> Outcome:
    """Of one mutant: the runs until one notices."""
    about = _about(target, mutant)
    for number, (timing, seed) in enumerate(runs):
        if by := notice(target, mutant.lines, timing, seed):
            return Outcome(*about, "noticed", number, by)
        if number == 0 and notice(target, mutant.reach, "early", 0) != "trap":
            return Outcome(*about, "not reached")
        if number == 0 and (why := reason(EQUIVALENT, target.name, hoppersim.ptx_of(target.kernel), mutant)):
            return Outcome(*about, "equivalent", None, why)
    why = reason(ESCAPES, target.name, hoppersim.ptx_of(target.kernel), mutant)
    return Outcome(*about, "escaped", None, why)


def _about(target: Target, mutant: mutate.Mutant) -> tuple:
    return target.name, mutant.kind, mutant.what, mutant.line, mutant.instruction


def chosen(
    kernels: Sequence[Target], kinds: Sequence[str], generate: Callable = mutate.mutants, draw: int = 0
) -> Iterator[tuple[Target, mutate.Mutant]]:
    """All of them: classes in turn, kernels in turn within a class, in the order of this draw within a kernel."""
    lists: dict[str, dict[Target, list[mutate.Mutant]]] = defaultdict(dict)
    for target in kernels:
        for mutant in generate(hoppersim.ptx_of(target.kernel)):
            key = mutant.kind if generate is mutate.mutants else mutant.what
            lists[key].setdefault(id(target), []).append((target, mutant))
    order = [
        _in_turn([sorted(of_kernel, key=lambda pair: _place(pair, draw)) for of_kernel in lists[kind].values()])
        for kind in (kinds or lists)
        if kind in lists
    ]
    yield from _in_turn(order)


def _place(pair: tuple[Target, mutate.Mutant], draw: int) -> int:
    """A number that stays the same where the mutant does."""
    target, mutant = pair
    about = f"{target.name} {mutant.kind} {mutant.what} {mutant.instruction} {mutant.line}"
    return zlib.crc32((f"{draw} {about}" if draw else about).encode())


def _in_turn(lists) -> list:
    lists = [list(one) for one in lists]
    longest = max(map(len, lists), default=0)
    return [one[i] for i in range(longest) for one in lists if i < len(one)]


def run(
    kernels: Sequence[Target],
    count: int,
    runs: Sequence[tuple[str, int]],
    kinds: Sequence[str] = (),
    generate: Callable = mutate.mutants,
    jobs: int = 1,
    draw: int = 0,
    tell: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """``count`` mutants that count, and those that do not which came up on the way."""
    outcomes: list[Outcome] = []
    counted = 0
    work = lambda pair: examine(*pair, runs)
    answers = in_children(work, chosen(kernels, kinds, generate, draw), jobs, SECONDS)
    with contextlib.closing(answers):
        for (target, mutant), outcome in answers:
            if isinstance(outcome, Lost):
                outcome = Outcome(*_about(target, mutant), "lost", None, str(outcome))
            outcomes.append(outcome)
            tell(outcome)
            counted += outcome.state in ("noticed", "escaped", "lost")
            if counted >= count:
                break
    return outcomes
