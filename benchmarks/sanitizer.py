"""Run every op on small shapes under compute-sanitizer: memcheck, racecheck, synccheck, side by side."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import ops, parts
from benchmarks.parts import Rows
from benchmarks.shapes import SHAPES, Draw, chosen_shapes, few_heads

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 86  # exit code of compute-sanitizer when it found something
LOG_LINES = 15


def describe() -> list[str]:
    cases = [case.name for case in ops.small(few_heads(SHAPES[0]))]
    return [f"compute-sanitizer {tool}: {len(cases)} small calls per shape, 2b, 4b and 128/128 with 2 heads" for tool in TOOLS]


def compute_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [shutil.which("compute-sanitizer"), *(f"{home}/bin/compute-sanitizer" for home in homes if home)]
    return next((path for path in candidates if path and Path(path).exists()), None)


def exercise(shapes) -> None:
    """What runs under the tool: inputs are drawn on the host, so that almost only our kernels run on the device."""
    from jetkernels import ops as _  # noqa: F401  (registers torch.ops.jet)

    for shape in shapes:
        for case in ops.small(few_heads(shape)):
            if not ops.exists(case.op):
                continue
            args = [a.cuda() if isinstance(a, torch.Tensor) else a for a in case.make(Draw())]
            print(f"{case.name}: {ops.served_by(case.op, tuple(args))}", flush=True)
            torch.cuda.synchronize()


def verdict(output: str, code: int) -> dict[str, object]:
    """What the end of a tool's output says."""
    counts = [int(n) for n in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)]
    calls = len(re.findall(r"^\w+ \S+ .*: (?:kernel|plain)", output, re.MULTILINE))
    row: dict[str, object] = {"calls": calls, "findings": sum(counts) if counts else None}
    if code == 0 and counts and not sum(counts):
        return row
    tail = " | ".join(output.strip().splitlines()[-LOG_LINES:])[-1500:]
    if code == FOUND or (counts and sum(counts)):
        return {**row, "failed": f"findings: {tail}"}
    if re.search(r"not supported|Unable to|failed to initialize", output, re.IGNORECASE):
        return {**row, "skipped": f"the tool does not work here: {tail}"}
    return {**row, "failed": f"exit code {code}: {tail}"}


def run_tools(rows: Rows, seconds: float, shape: str, sanitizer: str) -> None:
    deadline = time.monotonic() + seconds
    runs = []
    # Without the caching allocator each tensor is an allocation of its own, and an access past its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in TOOLS:
        log = tempfile.TemporaryFile("w+")
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20", "--target-processes", "all"]
        command += [sys.executable, "-m", "benchmarks.sanitizer", "--exercise", "--shape", shape]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        runs.append((tool, log, process))
    for tool, log, process in runs:
        try:
            code = process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            parts.stop(process)
            code = None
        log.seek(0)
        output = log.read()
        print(f"---- {tool}\n{output[-8000:]}", flush=True)
        if code is None:
            rows.add(tool=tool, failed=f"not finished in time; {verdict(output, 0)['calls']} calls were done")
        else:
            rows.add(tool=tool, **verdict(output, code))


def main() -> None:
    parser = parts.parser("sanitizer", __doc__)
    parser.add_argument("--exercise", action="store_true", help="only run the calls: what the tools watch")
    arguments = parser.parse_args()
    shapes = chosen_shapes(arguments.shape)[: 1 if arguments.quick else None]
    if not torch.cuda.is_available():
        print("no CUDA device")
        raise SystemExit(parts.SKIPPED)
    if arguments.exercise:
        exercise(shapes)
        return
    if (sanitizer := compute_sanitizer()) is None:
        print("compute-sanitizer is not installed here")
        raise SystemExit(parts.SKIPPED)
    rows = Rows(arguments.rows)
    run_tools(rows, arguments.seconds, "2b" if arguments.quick else arguments.shape, sanitizer)
    raise SystemExit(parts.failed(rows.rows))


if __name__ == "__main__":
    main()
