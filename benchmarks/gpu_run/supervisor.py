"""Starts children, reads the rows that they append to a file, ends those that stand still, and says whose fault it was.

A child does its cases in order. When it dies or is killed, the case it had begun is the culprit; the rest of its cases
go on in a new child. The next child is started ahead and waits, so that its imports cost no time on the device.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

from benchmarks import ROOT
from benchmarks.gpu_run import store
from benchmarks.rows import line

RUN_LOG = "run.log"
LOST = 75  # exit code of a child whose context a kernel broke; it has written the row of the culprit
TICK = 0.05  # s
REAP = 5  # s: a process that the driver holds may not go even when it is killed
TAIL = 600  # characters


class Job(NamedTuple):
    """What one child does."""

    name: str
    cases: tuple[str, ...] = ()  # in order; none where the child finds them itself


class Part(NamedTuple):
    name: str
    module: str  # its jobs(settings), work(case, context) or run(context), describe()
    rows: str  # rows-<rows>.jsonl
    share: float  # of the time that is left, against the shares of the parts that are still to come
    most: float = 1e9  # s
    workers: int = 1
    ahead: int = 0  # children that are started before it is their turn
    start: float = 60  # s until the first case begins
    silence: float = 25  # s without a row after that
    culprits: int = 3  # the rest of a job is given up after as many
    quiet: bool = False  # nothing else may use the device meanwhile
    watchdog: bool = False  # with the library whose waits have a watchdog, where there is one
    environment: dict = {}


def fault_of(text: str) -> str | None:
    """What a log or an exception says that a kernel did."""
    said = text.lower()
    if "jetkernels watchdog" in said:
        return "hang"
    addresses = r"illegal memory access|misaligned address|illegal address|invalid address space"
    if re.search(rf"{addresses}|illegal instruction|invalid program counter", said):
        return "illegal address"
    if re.search(r"unspecified launch failure|cudaerrorassert|device-side assert|cuda_error_launch", said):
        return "broken process"
    return None


def stop(process: subprocess.Popen) -> None:
    """Ends a child and what it started, at once; it has nothing to tidy up."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=REAP)


def environment_of(part: Part, settings: dict) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [settings.get("peers_path"), os.environ.get("PYTHONPATH")])]
    found = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    if part.watchdog and settings.get("watchdog"):
        found["JETKERNELS_LIBRARY"] = settings["watchdog"]
    return found | part.environment


class Child:
    def __init__(self, part: Part, job: Job, settings: dict, folder: Path, culprits: int = 0):
        self.part, self.job, self.culprits = part, job, culprits
        self.name = f"{part.name} {job.name}" + f" ({culprits + 1})" * bool(culprits)
        self.seen: set[str] = set()
        self.begun: str | None = None
        self.at = 0.0  # of its last sign of life; 0 before its turn
        handle, log = tempfile.mkstemp(suffix=".log", dir=folder)
        self.log = Path(log)
        rows = Path(settings["output"]) / f"rows-{part.rows}.jsonl"
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu_run.child",
            part.module,
            "--part",
            part.name,
            "--name",
            self.name,
            "--rows",
            str(rows),
        ]
        command += ["--settings", json.dumps(settings), "--cases", json.dumps(job.cases)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=handle,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment_of(part, settings),
            start_new_session=True,
        )
        os.close(handle)

    def go(self) -> None:
        self.at = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"go\n")
            self.process.stdin.flush()

    def saw(self, row: dict) -> None:
        self.at = time.monotonic()
        if "begin" in row:
            self.begun = row["begin"]
        else:
            self.seen.add(row["case"])

    def is_silent(self) -> bool:
        return time.monotonic() - self.at > (self.part.start if self.begun is None else self.part.silence)

    def left(self) -> tuple[str, ...]:
        return tuple(case for case in self.job.cases if case not in self.seen)


class Pool:
    """The children of one part."""

    def __init__(self, part: Part, jobs: list[Job], settings: dict, end: float, folder: Path, say=print):
        self.part, self.settings, self.end, self.folder, self.say = part, settings, end, folder, say
        self.output = Path(settings["output"])
        self.rows = self.output / f"rows-{part.rows}.jsonl"
        self.tail = store.Tail(self.rows)
        self.waiting = deque((job, 0) for job in jobs)
        self.children: list[Child] = []

    def run(self) -> bool:
        """Whether everything was done before the end of the time."""
        try:
            while self.waiting or self.children:
                while self.waiting and len(self.children) < self.part.workers + self.part.ahead:
                    job, culprits = self.waiting.popleft()
                    self.children.append(Child(self.part, job, self.settings, self.folder, culprits))
                for child in self.children[: self.part.workers]:
                    if not child.at:
                        child.go()
                self.look()
                if time.monotonic() > self.end:
                    return self.give_up()
                time.sleep(TICK)
            return True
        finally:
            for child in self.children:
                stop(child.process)

    def add(self, child: Child, case: str, **row) -> None:
        store.append(self.rows, {"part": self.part.name, "case": case, **row, "child": child.name})

    def hear(self) -> None:
        by_name = {child.name: child for child in self.children}
        for row in self.tail.new():
            if (child := by_name.get(row.get("child"))) is not None:
                child.saw(row)
            if "begin" not in row:
                self.say(
                    line({key: value for key, value in row.items() if key not in ("child", "provenance", "tail")})[:300]
                )

    def look(self) -> None:
        self.hear()
        for child in list(self.children[: self.part.workers]):
            code = child.process.poll()
            if code is None and not child.is_silent():
                continue
            stop(child.process)  # also what an ended child may have left behind
            self.hear()  # what it wrote before it ended
            self.children.remove(child)
            self.judge(child, code)
        self.hear()

    def judge(self, child: Child, code: int | None) -> None:
        """Writes the row of the culprit, and sends what is left on in a new child."""
        text = store.tidy_copy(
            child.log, self.output / RUN_LOG, child.name, "killed: it stood still" if code is None else code
        )
        child.log.unlink(missing_ok=True)
        tail = text.strip()[-TAIL:]
        if code == 0:
            for case in child.left():
                self.add(child, case, failed="the child ended without a row for it", tail=tail)
            return
        if code == LOST:
            self.explain(child, tail)
        elif child.begun is None:
            why = (
                f"no case began within {self.part.start:g} s"
                if code is None
                else f"exit code {code} before a case began"
            )
            for case in child.left() or (child.job.name,):
                self.add(
                    child,
                    case,
                    failed=f"{why}: {tail.splitlines()[-1] if tail else 'it said nothing'}"[:400],
                    tail=tail,
                )
            return
        elif child.begun not in child.seen:
            status = "hang" if code is None else fault_of(text) or "broken process"
            why = f"no row within {self.part.silence:g} s, killed" if code is None else f"the process ended with {code}"
            self.add(child, child.begun, status=status, failed=f"{status}: {why}", tail=tail)
            child.seen.add(child.begun)
        self.go_on(child)

    def explain(self, child: Child, tail: str) -> None:
        """The row of the case after which the device was lost, with the end of the log."""
        row = store.latest(store.read(self.rows)).get((self.part.name, child.begun), {})
        failed = row.get("failed") or "the device was lost after it"
        store.append(
            self.rows,
            {
                "part": self.part.name,
                "case": child.begun,
                "status": "broken process",
                **row,
                "failed": failed,
                "tail": tail,
            },
        )

    def go_on(self, child: Child) -> None:
        left = child.left()
        if child.job.cases and not left:
            return
        if child.culprits + 1 < self.part.culprits:
            self.waiting.appendleft((child.job._replace(cases=left), child.culprits + 1))
            return
        for case in left or (child.job.name,):
            self.add(child, case, skipped=f"given up after {child.culprits + 1} broken processes")

    def give_up(self) -> bool:
        """The time is over: what was not reached is named."""
        for child in self.children:
            stop(child.process)
        self.hear()
        for child in self.children:
            store.tidy_copy(child.log, self.output / RUN_LOG, child.name, "stopped: the time was over")
            for case in child.left() or (() if child.job.cases else (child.job.name,)):
                at = " while it ran" if case == child.begun else ""
                self.add(child, case, skipped=f"the time of {self.part.name} was over{at}")
        for job, _ in self.waiting:
            for case in job.cases or (job.name,):
                store.append(
                    self.rows,
                    {"part": self.part.name, "case": case, "skipped": f"the time of {self.part.name} was over"},
                )
        self.children, self.waiting = [], deque()
        self.hear()
        return False


class Background:
    """A child that runs beside the parts and stands still while one of them needs the device for itself."""

    def __init__(self, part: Part, jobs: list[Job], settings: dict, folder: Path):
        self.output = Path(settings["output"])
        self.child = Child(part, jobs[0], settings, folder) if jobs else None
        if self.child:
            self.child.go()

    def signal(self, number: int) -> None:
        if self.child and self.child.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.child.process.pid, number)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def end(self) -> None:
        if self.child:
            stop(self.child.process)
            store.tidy_copy(self.child.log, self.output / RUN_LOG, self.child.name, self.child.process.poll())
            self.child = None
