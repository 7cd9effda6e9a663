"""What the parts of a run on a GPU share: rows that survive a part that is stopped, a clock, exit codes."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

SKIPPED = 77  # exit code of a part that had nothing to do here; the last line of its output says why


class Clock:
    """The seconds that a part has left."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


class Rows:
    """Rows of results, each on disk as soon as it is known. A resumed part goes on after those that are there."""

    def __init__(self, path: Path | None = None, resume: bool = False):
        self.path, self.resumed = path, resume
        self.rows = read(path) if resume else []

    def has(self, **what) -> bool:
        """Whether a case has a row already, or was given up because it lost the device."""
        return self.is_lost(**what) or any(row.items() >= what.items() for row in self.rows)

    def is_lost(self, **what) -> bool:
        return any("lost" in row and what.items() >= row["lost"].items() for row in self.rows)

    def add(self, **row) -> dict:
        self.rows.append(row)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        print("  ".join(f"{k}={_short(v)}" for k, v in row.items() if v not in (None, "")), flush=True)
        return row

    def attempt(self, clock: Clock, work: Callable[[], dict | None], **what) -> None:
        """Adds ``what`` with the results of ``work``, or with the reason why there are none."""
        if clock.left() <= 0:
            self.add(**what, skipped="the time of this part was over")
            return
        try:
            found = work()
        except Exception as error:  # one case must not stop the others
            traceback.print_exc()
            self.add(**what, failed=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300])
        else:
            self.add(**what, **(found or {}))


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the part was stopped while it wrote
            continue
    return rows


def parser(module: str, description: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=description.splitlines()[0])
    found.add_argument("--rows", type=Path, help="file that gets a JSON line per result")
    found.add_argument("--seconds", type=float, default=480, help="start nothing new after this long")
    found.add_argument("--resume", action="store_true", help="go on after the rows that are in the file")
    found.add_argument("--quick", action="store_true", help="fewer sizes")
    found.add_argument("--shape", default="all", help="2b, 4b, 128/128 or all")
    return found


def device_is_lost() -> bool:
    """Whether a kernel broke this process's context: then every later call fails, whatever it is."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def start_again(module: str, rows: Rows, clock: Clock, lost: dict[str, str]) -> None:
    """Goes on in a new process, without the cases that ``lost`` describes. Returns only where there is no file to go on from."""
    rows.add(lost=lost, failed=f"the device was lost; {lost} is given up, the rest goes on in a new process")
    if rows.path is None or clock.left() < 10:
        return
    arguments = [a for a in sys.argv[1:] if a != "--resume"] + ["--resume", "--seconds", str(clock.left())]
    sys.stdout.flush(), sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", f"benchmarks.{module}", *arguments])


def stop(process: subprocess.Popen) -> None:
    """Ends a process that was started in a session of its own, and what it started."""
    for signal_number, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue


def failed(rows: list[dict]) -> bool:
    return any("failed" in row for row in rows)
