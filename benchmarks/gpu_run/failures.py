"""Each case of smoke that failed, once more under memcheck; what it says goes into the case's row."""

from pathlib import Path

from benchmarks.gpu_run import sanitizer, store
from benchmarks.gpu_run.supervisor import Job

NEEDS_LIBRARY = False
JUDGES = True  # runs what is broken
MOST = 6


def describe() -> list[str]:
    return ["each case of smoke that failed, once more under compute-sanitizer with CUDA_LAUNCH_BLOCKING=1"]


def failed(output: Path) -> list[str]:
    """Faults before wrong results. A case without a status did not reach a kernel."""
    rows = [
        (case, row)
        for (part, case), row in store.known(output).items()
        if part == "smoke" and row.get("status") in store.FAULTS
    ]
    return [case for case, row in sorted(rows, key=lambda pair: pair[1]["status"] == "wrong")]


def jobs(settings: dict) -> list[Job]:
    return [Job(case, (case,)) for case in failed(Path(settings["output"]))[:MOST]]


def work(name: str, context) -> dict[str, object]:
    found = {"memcheck": sanitizer.smoke_again(name)}
    row = context.known(name, "smoke")
    store.append(context.rows, {**row, **found})
    return found
