"""Runs cases in processes of their own, counts, and says what was seen.

A process writes a line of JSON before a case and after it, so that one that crashes names its case; the next process
goes on with the case after it.
"""

import json
import os
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import ROOT

MOST_FAILURES = 50  # of one backend: more say nothing new


class Failure(NamedTuple):
    command: str  # that runs the case again
    reason: str


class Row(NamedTuple):
    """What one process says of one case."""

    op: str
    dtype: str
    measured: list  # [name, dtype of the result, error, ceiling, ill-conditioned]
    reason: str | None
    what: str


class Summary:
    def __init__(self):
        self.cases: Counter = Counter()  # (op, backend, dtype)
        self.worst: dict[tuple[str, str, str], tuple[float, float]] = {}  # (op, dtype, result) -> (error, ceiling)
        self.ill: Counter = Counter()  # op
        self.failures: list[Failure] = []
        self.seconds: defaultdict[str, float] = defaultdict(float)  # by backend
        self.told = time.monotonic()  # when progress was last printed

    def add(self, backend: str, number: int, row: Row) -> None:
        self.cases[row.op, backend, row.dtype] += 1
        for name, stored, error, ceiling, ill in row.measured:
            key = (row.op, row.dtype, name if stored == row.dtype else f"{name} ({stored})")
            if error / ceiling >= self.worst.get(key, (0.0, 1.0))[0] / self.worst.get(key, (0.0, 1.0))[1]:
                self.worst[key] = (error, ceiling)
            self.ill[row.op] += ill
        if row.reason:
            self.fail(backend, number, row.op, row.reason)

    def fail(self, backend: str, number: int, op: str | None, reason: str) -> None:
        command = f"python -m tests.fuzz --case {number} --backend {backend}" + (f" --op {op}" if op else "")
        self.failures.append(Failure(command, reason))
        print(f"FAILED {command}\n    {reason}", flush=True)

    def text(self) -> str:
        lines = [f"{sum(self.cases.values())} cases, {len(self.failures)} failed, {sum(self.seconds.values()):.0f} s"]
        backends = list(dict.fromkeys(backend for _, backend, _ in self.cases))
        dtypes = sorted({dtype for *_, dtype in self.cases}, key=["float64", "float32", "float16", "bfloat16"].index)
        lines.append("\ncases by op, backend and dtype")
        width = max((len(op) for op, *_ in self.cases), default=0)
        for op in sorted({op for op, *_ in self.cases}):
            for backend in backends:
                counts = [
                    f"{dtype} {self.cases[op, backend, dtype]}" for dtype in dtypes if self.cases[op, backend, dtype]
                ]
                if counts:
                    lines.append(f"  {op:{width}}  {backend:11}  {'  '.join(counts)}")
        lines.append("\nworst RMS error / ceiling, by op, dtype and result")
        for op, dtype in sorted({key[:2] for key in self.worst}):
            found = [(name, *self.worst[op, dtype, name]) for *key, name in self.worst if key == [op, dtype]]
            results = [f"{name} {error:.1e}/{ceiling:.0e}" for name, error, ceiling in sorted(found)]
            lines.append(f"  {op:{width}}  {dtype:8}  {'  '.join(results)}")
        for op, number in sorted(self.ill.items()):
            if number:
                lines.append(
                    f"  {op}: {number} results of ill-conditioned cases were held against what rounding the inputs does"
                )
        lines.append("\n" + "  ".join(f"{backend} {seconds:.0f} s" for backend, seconds in self.seconds.items()))
        return "\n".join(lines)


# ---- in the process that runs cases


def run_case(number: int, op: str | None, backend: str, values: bool = True, change: Callable | None = None) -> Row:
    """``values``: as for `check`. ``change`` makes another backend of the backend: how a test plants a fault."""
    from .backends import backend_of, takes_kernels_only
    from .check import check
    from .draw import case_of

    case = case_of(number, op, takes_kernels_only(backend))
    instance = backend_of(backend, case.choice)
    measured, reason = [], None
    try:
        found = check(case, change(instance) if change else instance, values)
        measured = [[m.name, _name(m.dtype), m.error, m.ceiling, m.ill] for m in found]
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if not isinstance(error, AssertionError):
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason += f" (at {Path(place.filename).name}:{place.lineno})"
    return Row(case.op, _name(case.dtype), measured, reason, case.what)


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def child(backend: str, op: str | None, first: int, cases: int, seconds: float, values: bool) -> None:
    from .backends import start

    start(backend)
    say = lambda **facts: print(json.dumps(facts), flush=True)
    end = time.monotonic() + seconds
    for number in range(first, first + cases):
        if time.monotonic() > end:
            break
        say(case=number)
        say(row=run_case(number, op, backend, values))


# ---- in the process that was started


def _last_line(printed: str) -> str:
    return (printed.strip().splitlines() or ["it printed nothing"])[-1]


class Process(NamedTuple):
    """How cases are run."""

    before: Sequence[str] = ()  # stands before the command
    reason: Callable[[str], str] = _last_line  # why a process ended, from what it printed
    values: bool = True


def run_backend(
    summary: Summary, backend: str, op: str | None, first: int, cases: int, seconds: float, process: Process
) -> None:
    """Cases ``first`` to ``first + cases``, or as many as ``seconds`` allow."""
    begin = time.monotonic()
    number, failed_before = first, len(summary.failures)
    while number < first + cases and (left := seconds - (time.monotonic() - begin)) > 0:
        if len(summary.failures) - failed_before >= MOST_FAILURES:
            print(f"{backend}: {MOST_FAILURES} failures; the rest of its cases is not run", flush=True)
            break
        number, row, code, printed = _one_process(summary, backend, op, number, first + cases, left, process)
        if code == 0:
            break
        reason = process.reason(printed)
        summary.fail(backend, number, row and row.op, f"the process ended with status {code}: {reason}")
        number += 1
    summary.seconds[backend] += time.monotonic() - begin


def _one_process(summary: Summary, backend: str, op: str | None, number: int, end: int, seconds: float, how: Process):
    arguments = [
        "--child",
        "--backend",
        backend,
        "--seed",
        str(number),
        "--cases",
        str(end - number),
        "--seconds",
        str(seconds),
    ]
    command = [
        *how.before,
        sys.executable,
        "-m",
        "tests.fuzz",
        *arguments,
        *(["--op", op] if op else []),
        *([] if how.values else ["--bits-only"]),
    ]
    # Idle OpenMP threads that spin take the processor from everything else.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={"OMP_WAIT_POLICY": "passive", **os.environ},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    other, row = [], None
    for line in process.stdout:
        if line.startswith('{"case": '):
            number, row = json.loads(line)["case"], None
        elif line.startswith('{"row": '):
            row = Row(*json.loads(line)["row"])
            summary.add(backend, number, row)
            if time.monotonic() - summary.told > 60:
                summary.told = time.monotonic()
                cases, failed = sum(summary.cases.values()), len(summary.failures)
                print(f"... {cases} cases, {failed} failed; {backend} is at {number}", flush=True)
        else:
            other.append(line)
    code = process.wait()
    return number, row, code, "".join(other)


def run(
    backends: Sequence[str], op: str | None, first: int, cases: int | None, seconds: float, process: Process = Process()
) -> Summary:
    """``cases`` and ``seconds`` in all, the same share for each backend."""
    summary = Summary()
    try:
        for i, backend in enumerate(backends):
            share = (1 << 40) if cases is None else cases * (i + 1) // len(backends) - cases * i // len(backends)
            run_backend(summary, backend, op, first, share, seconds / len(backends), process)
    except KeyboardInterrupt:
        print("interrupted: this is what was seen until then", flush=True)
    return summary
