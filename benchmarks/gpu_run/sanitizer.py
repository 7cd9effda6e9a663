"""compute-sanitizer: the small calls of the 2B shape, and each case of smoke that failed."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import ops
from benchmarks.gpu_run import smoke, store, watchdog
from benchmarks.gpu_run.supervisor import Job
from benchmarks.shapes import SHAPES, Draw, few_heads

NEEDS_LIBRARY = False  # what runs under the tool imports it
TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 86  # exit code of compute-sanitizer when it found something
LOG_LINES = 15
SMOKE_SECONDS = 30  # of a case of smoke under memcheck


def describe() -> list[str]:
    return [f"compute-sanitizer {tool}: the small calls of the 2B shape with 2 heads" for tool in TOOLS]


def jobs(settings: dict) -> list[Job]:
    return [Job(tool, (tool,)) for tool in TOOLS]


def compute_sanitizer() -> str:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [shutil.which("compute-sanitizer"), *(f"{home}/bin/compute-sanitizer" for home in homes if home)]
    if (found := next((path for path in candidates if path and Path(path).exists()), None)) is None:
        raise FileNotFoundError("compute-sanitizer is not installed here")
    return found


def exercise(cases: list[ops.Case]) -> None:
    """What runs under the tool: inputs are drawn on the host, so that almost only our kernels run on the device."""
    from jetkernels import ops as _  # noqa: F401  (registers torch.ops.jet)

    watchdog.records()
    for case in cases:
        args = [a.cuda() if isinstance(a, torch.Tensor) else a for a in case.make(Draw())]
        print(f"{case.name}: {ops.served_by(case.op, tuple(args))}", flush=True)
        ops.function(case.op)(*args)
        torch.cuda.synchronize()


def watched(tool: str, command: list[str], seconds: float | None = None, **environment: str) -> tuple[int | None, str]:
    """(exit code or None, output) of a command under a tool."""
    whole = [
        compute_sanitizer(),
        "--tool",
        tool,
        "--error-exitcode",
        str(FOUND),
        "--print-limit",
        "20",
        "--target-processes",
        "all",
        *command,
    ]
    # Without the caching allocator each tensor is an allocation of its own, and an access past its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", **environment}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(whole, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()  # what it started ends with this process's group, which the supervisor sweeps
            code = None
        log.seek(0)
        output = log.read()
    print(output[-8000:], flush=True)
    return code, output


def verdict(output: str, code: int) -> dict[str, object]:
    """What the end of a tool's output says."""
    counts = [int(n) for n in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)]
    calls = len(re.findall(r"^\w+ \S+ .*: (?:kernel|plain)", output, re.MULTILINE))
    row: dict[str, object] = {"calls": calls, "findings": sum(counts) if counts else None}
    if code == 0 and counts and not sum(counts):
        return row
    tail = " | ".join(output.strip().splitlines()[-LOG_LINES:])[-1500:]
    if code == FOUND or (counts and sum(counts)):
        return {**row, "failed": f"findings: {gist(output) or tail}"}
    if re.search(r"not supported|Unable to|failed to initialize", output, re.IGNORECASE):
        return {**row, "skipped": f"the tool does not work here: {tail}"}
    return {**row, "failed": f"exit code {code}: {tail}"}


def gist(output: str) -> str:
    """The first finding of memcheck: what, in which kernel, which thread, which address."""
    lines = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    start = next(
        (i for i, line in enumerate(lines) if re.match(r"Invalid|Program hit|Error:|Race|Barrier|Uninit|Out-of", line)),
        None,
    )
    return " | ".join(line for line in lines[start : start + 6] if line)[:600] if start is not None else ""


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_run.sanitizer", *options]


def work(tool: str, context) -> dict[str, object]:
    broken = sorted({entry["op"] for entry in store.read_broken(context.output)})
    code, output = watched(tool, command("--without", *broken) if broken else command())
    return verdict(output, code)


def smoke_again(name: str) -> str:
    """The gist of what memcheck says of one case of smoke."""
    code, output = watched("memcheck", command("--case", name), SMOKE_SECONDS, CUDA_LAUNCH_BLOCKING="1")
    if code is None:
        return f"not finished within {SMOKE_SECONDS} s. {gist(output)}".strip()
    counts = re.findall(r"ERROR SUMMARY: (\d+)", output)
    return gist(output) or (f"{counts[-1]} errors" if counts else f"exit code {code}: {output.strip()[-200:]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_run.sanitizer", description="Small calls of the 2B shape, for a tool to watch."
    )
    parser.add_argument("--case", help="one case of smoke instead")
    parser.add_argument("--without", nargs="*", default=[], help="ops that are broken")
    arguments = parser.parse_args()
    small = [case for case in ops.small(few_heads(SHAPES[0])) if case.op not in arguments.without]
    exercise([smoke.cases()[arguments.case]] if arguments.case else small)


if __name__ == "__main__":
    main()
