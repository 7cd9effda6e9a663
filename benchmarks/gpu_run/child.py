"""What the supervisor starts: imports, waits for its turn, does its cases in order.

It appends a row for each case as soon as it is known.
"""

import argparse
import contextlib
import ctypes
import functools
import importlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

from benchmarks import rows
from benchmarks.gpu_run import store, watchdog
from benchmarks.gpu_run.supervisor import LOST, fault_of


class Context:
    """What a worker may know: the settings of the run, its part, the rows so far."""

    def __init__(self, part: str, name: str, rows: Path, settings: dict, cases: tuple[str, ...] = ()):
        self.part, self.name, self.rows, self.settings, self.cases = part, name, rows, settings, cases
        self.output = Path(settings["output"])

    @functools.cached_property
    def device(self):
        import torch

        if self.settings.get("device", "cuda") != "cuda":
            return torch.device(self.settings["device"])
        watchdog.records()
        return torch.device("cuda", torch.cuda.current_device())

    def begin(self, case: str) -> None:
        store.append(self.rows, {"child": self.name, "begin": case})

    def add(self, case: str, **row) -> None:
        store.append(self.rows, {"part": self.part, "case": case, **row, "child": self.name})

    def known(self, case: str, part: str | None = None) -> dict:
        return store.known(self.output).get((part or self.part, case), {})


def flush() -> None:
    """Also what kernels printed, which lies in the C library's buffer."""
    sys.stdout.flush(), sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)


def fault(error: BaseException) -> dict[str, str]:
    """What an exception of a case says, and the watchdog, which knows better."""
    if said := watchdog.said():
        print("\n".join(said), flush=True)
        return {"status": "hang", "failed": said[0]}
    status = fault_of(str(error))
    return {**({"status": status} if status else {}), "failed": (f"{status}: " if status else "") + rows.reason(error)}


def leave_lost() -> None:
    """Without destructors, which may hang in a broken context."""
    flush()
    os._exit(LOST)


def do(worker, case: str, context: Context) -> None:
    context.begin(case)
    if not getattr(worker, "JUDGES", False) and (blocked := store.blocked(case, context.output)):
        context.add(case, skipped=blocked)
        return
    try:
        found = worker.work(case, context)
    except Exception as error:
        traceback.print_exc()
        context.add(case, **fault(error))
    else:
        context.add(case, **found)
    flush()
    if rows.device_is_lost():
        leave_lost()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run.child")
    parser.add_argument("module")
    parser.add_argument("--part", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, required=True)
    parser.add_argument("--cases", type=json.loads, default=[])
    arguments = parser.parse_args()
    context = Context(arguments.part, arguments.name, arguments.rows, arguments.settings, tuple(arguments.cases))
    worker = importlib.import_module(arguments.module)
    if getattr(worker, "NEEDS_LIBRARY", True):
        with contextlib.suppress(Exception):  # a library that does not load is the reason of each case that needs it
            importlib.import_module("jetkernels.ops")
    sys.stdin.readline()  # the supervisor's word that it is this child's turn
    if hasattr(worker, "run"):
        worker.run(context)
        return
    warnings.simplefilter("ignore")  # who served a call is in its row
    torch = sys.modules.get("torch")  # a worker that does not need it is not made to wait for it
    with torch.no_grad() if torch else contextlib.nullcontext():
        for case in context.cases:
            do(worker, case, context)


if __name__ == "__main__":
    main()
