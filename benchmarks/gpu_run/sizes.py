"""The ops at all other sizes, a process per op and shape."""

from functools import cache

from benchmarks import ops
from benchmarks.gpu_run import key
from benchmarks.gpu_run.supervisor import Job
from benchmarks.ops import Case
from benchmarks.shapes import SHAPES


@cache
def cases() -> dict[str, Case]:
    return {case.name: case for case in ops.measured(list(SHAPES)) if case.name not in key.cases()}


def groups() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for case in cases().values():
        found.setdefault(f"{case.op} {case.shape.name}", []).append(case.name)
    return found


def describe() -> list[str]:
    return [f"{name}: {len(cases)} sizes" for name, cases in groups().items()]


def jobs(settings: dict) -> list[Job]:
    return [Job(name, tuple(cases)) for name, cases in groups().items()]


def work(name: str, context) -> dict[str, object]:
    return key.measured(cases()[name], context)
