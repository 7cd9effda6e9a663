"""Options of launches, and what is known of those that ran."""

import contextlib
import functools
from typing import NamedTuple

from ._native import native


class Kind(NamedTuple):
    severity: str  # "error" or "warning", unless simulate() says otherwise
    meaning: str  # when it is reported
    goes_on: bool  # the machine is in a defined state after it: it may be allowed, and go_on collects it


@functools.cache
def kinds() -> dict[str, Kind]:
    """Every kind of report, by its name."""
    return {name: Kind(*facts) for name, *facts in native().kinds()}


def named(option: str, names, *, goes_on: bool = False) -> list[str]:
    """The kinds that an option names; a ValueError if there is no such kind, or one that must go on does not."""
    names = [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in kinds()]:
        raise ValueError(f"{option}: no kind {unknown}; the kinds are {', '.join(kinds())}")
    if fatal := [name for name in names if goes_on and not kinds()[name].goes_on]:
        raise ValueError(f"{option}: a launch cannot go on after {fatal}")
    return names


@contextlib.contextmanager
def simulate(
    *,
    timing: str = "early",
    seed: int = 0,
    host_threads: int = 2,
    max_instructions: int | None = None,
    check_global: bool = True,
    allow=(),
    warn_as_error=(),
    strict: bool = False,
    go_on: bool = False,
):
    """Options of the launches in the block; raises at its end the Fault that the CUDA runtime only reported.

    That is the first finding, or the first call that is not modelled ("unsupported runtime call").

    ``timing``: asynchronous effects at once ("early") or as late as allowed ("late"). ``seed``: order of warps and
    CTAs, 0 in order. ``allow``: kinds that are not reported. ``warn_as_error``: kinds of warnings that are errors;
    ``strict``: all are. ``go_on``: errors after which the machine is in a defined state are collected, and raised as
    one Fault at the end of the block. ``max_instructions``: a cluster that executes as many without one that stores,
    copies, multiplies, arrives or passes a barrier is reported as a live-lock; by default about two minutes of it.
    """
    simulator = native()
    allow, warn_as_error = named("allow", allow, goes_on=True), named("warn_as_error", warn_as_error)
    before = simulator.options()
    simulator.raise_fault()
    simulator.clear_launches()
    limit = simulator.MAX_INSTRUCTIONS if max_instructions is None else max_instructions
    simulator.clear_reports()
    simulator.set_options(timing, seed, host_threads, limit, check_global, allow, warn_as_error, strict, go_on)
    try:
        yield
    except Exception as error:
        try:
            simulator.raise_fault()
            if not isinstance(error, simulator.Fault):
                simulator.raise_collected()
        except simulator.Fault as fault:
            raise fault from error
        raise
    finally:
        simulator.set_options(**before)
    simulator.raise_fault()
    simulator.raise_collected()


def reports() -> list[dict]:
    """What was found since the last ``simulate`` block began, each kind and PTX line of a kernel once.

    Keys: kind, severity, kernel, mangled (its name in the PTX), source (file:line, by -lineinfo), line (of the PTX),
    instruction, cta, warp, lane (None where there is none), text, count (how often it was found).
    """
    return native().reports()


def launches() -> list[dict]:
    """Launches since the last ``simulate`` block began: kernel, grid, block, cluster, shared bytes, counters."""
    return native().launches()


def last_counters() -> dict:
    """Counters of the last launch."""
    records = launches()
    if not records:
        raise RuntimeError("nothing was launched since the last simulate() began")
    return records[-1]["counters"]
