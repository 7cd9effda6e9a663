"""Turn a Hopper GPU into evidence: op tests, measurements, peers, simulator against hardware, sanitisers, in one run.

Writes results.json, summary.md and run.log into OUTPUT. Each part is a process with a share of the time; one that
fails or runs over its time does not stop the others. Exit code: 0 if every part ran, 1 if one failed, 3 without a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks import library, measure, op_tests, parts, report, sanitizer, simulator, versus
from benchmarks.provenance import ROOT

SECONDS = 465  # all parts together; under 8 minutes with what comes before and after
GRACE = 10  # s: a part stops by itself at its share, and is stopped this much later
LOG = "run.log"
LOG_TAIL = 25  # lines
RED = ("failed", "out of time")
NO_GPU = 3


class Part(NamedTuple):
    name: str
    module: object
    share: float  # of the time, against the shares of the parts that are still to come
    arguments: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", self.module.__spec__.name, *self.arguments]


# In order of value: what is right before what is fast, and first what decides.
PARTS = (
    Part("tests", op_tests, 110),
    Part("measure", measure, 140),
    Part("peers", versus, 110),
    Part("simulator", simulator, 35, ("compare",)),
    Part("sanitizer", sanitizer, 60),
)
LIBRARY = Part("library", library, 180)


def chosen_parts(names: str) -> list[Part]:
    """Parts in the order in which they were named."""
    known = {part.name: part for part in PARTS}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"unknown part {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(wanted)]


def gpu_problem() -> str | None:
    """Why this machine cannot be measured, or None."""
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA device here (torch.cuda.is_available() is false)"
    if (capability := torch.cuda.get_device_capability()) != (9, 0):
        return f"the device is of compute capability {capability[0]}.{capability[1]}, the kernels are for 9.0 (H100, H200)"
    return None


def stands_ready(problem: str, chosen: list[Part]) -> str:
    lines = [f"Nothing was measured: {problem}.", "The script stands ready. On a machine with a Hopper GPU it would run:"]
    for part in (LIBRARY, *chosen):
        lines += ["", f"{part.name} (python -m {part.module.__spec__.name})", *(f"  * {line}" for line in part.module.describe())]
    return "\n".join(lines)


def status_of(code: int | None, rows: list[dict], log_tail: list[str], seconds: float) -> tuple[str, str | None]:
    """(status, reason) of a part that ended with ``code``, None where it had to be stopped."""
    if code is None:
        return "out of time", f"stopped after {seconds:.0f} s; what it had found by then is below"
    if code == parts.SKIPPED:
        return "skipped", (log_tail or ["it did not say why"])[-1]
    if code == 0:
        left_out = sum("skipped" in row for row in rows)
        return "ran", f"{left_out} rows left out" if left_out else None
    if count := sum("failed" in row for row in rows):
        return "failed", f"{count} of {len(rows)} rows failed"
    return "failed", f"exit code {code}"


def run_part(part: Part, seconds: float, more: list[str], output: Path) -> dict[str, object]:
    log = output / LOG
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.jsonl"
        command = [*part.command, *more, "--rows", str(rows_file), "--seconds", f"{max(seconds - GRACE, 1):.0f}"]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with open(log, "ab") as file:
            file.write(f"==== {part.name}\n".encode())
            file.flush()
            begin = file.tell()
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
            try:
                code = process.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                parts.stop(process)
                code = None
        rows = parts.read(rows_file)
    log_tail = log.read_bytes()[begin:].decode(errors="replace").splitlines()[-LOG_TAIL:]
    status, reason = status_of(code, rows, log_tail, seconds)
    found = {"part": part.name, "status": status, "reason": reason, "seconds": time.monotonic() - start, "rows": rows}
    return {**found, "log_tail": "\n".join(log_tail)} if status in RED else found


def write(output: Path, facts: dict, done: list[dict]) -> None:
    (output / "results.json").write_text(json.dumps({"provenance": facts, "parts": done}, indent=1) + "\n")
    (output / "summary.md").write_text(report.summary(facts, done))


def run_all(chosen: list[Part], output: Path, seconds: float, more: dict[str, list[str]], before: list[dict]) -> list[dict[str, object]]:
    """Every part in turn, after ``before``; files are written each time, so that a run that is cut off leaves what it had."""
    end = time.monotonic() + seconds
    facts: dict[str, object] = {"command": " ".join(["benchmarks/on_gpu.sh", *sys.argv[1:]])}
    done = list(before)
    for i, part in enumerate(chosen):
        left = end - time.monotonic()
        share = left * part.share / sum(later.share for later in chosen[i:])
        if left < GRACE:
            done.append({"part": part.name, "status": "skipped", "reason": "the time of the whole run was over", "seconds": 0.0, "rows": []})
        else:
            print(f"{part.name}: up to {share:.0f} s", flush=True)
            done.append(run_part(part, share, more.get(part.name, []), output))
            found = next((row["provenance"] for row in done[-1]["rows"] if "provenance" in row), {})
            facts = {**found, **facts}  # a part's own command stays in its rows
        write(output, facts, done)
    return done


def print_end(done: list[dict], output: Path) -> None:
    print()
    print(report.table(done, {"part": "part", "status": "status", "seconds": "s", "reason": "why"}))
    for part in done:
        for line in report.reasons(part["rows"]):
            print(f"{part['part']} {line}")
        if part["status"] in RED:
            print(f"---- end of the log of {part['part']}\n{part.get('log_tail', '')}")
    print(f"\nwritten to {output}: results.json, summary.md, {LOG}")


def arguments_of(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/on_gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for the results")
    parser.add_argument("--parts", default=",".join(part.name for part in PARTS), help="comma-separated, in this order (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--shape", default="all", help="2b, 4b, 128/128 or all")
    parser.add_argument("--wheels", type=Path, default=os.environ.get("PEER_WHEELS"), help="folder of the peers' wheels (or PEER_WHEELS)")
    parser.add_argument("--simulated", type=Path, help="what `python -m benchmarks.simulator prepare` wrote on another machine")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"time of the whole run (default {SECONDS})")
    parser.add_argument("--commit", help="the commit of this tree, where it has no git")
    arguments = parser.parse_args(argv)
    try:
        arguments.parts = chosen_parts(arguments.parts)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = arguments_of(argv)
    if problem := gpu_problem():
        print(stands_ready(problem, arguments.parts))
        return NO_GPU
    if arguments.commit:
        os.environ["JETKERNELS_COMMIT"] = arguments.commit
    common = ["--shape", arguments.shape] + ["--quick"] * arguments.quick
    more = {part.name: list(common) for part in PARTS}
    if arguments.wheels:
        more["peers"] += ["--wheels", str(Path(arguments.wheels).resolve())]
    if arguments.simulated:
        more["simulator"].insert(0, str(arguments.simulated.resolve()))
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    (output / LOG).unlink(missing_ok=True)
    start = time.monotonic()
    done = run_all([LIBRARY], output, min(arguments.seconds, LIBRARY.share), {}, [])
    if done[0]["status"] != "ran":
        print_end(done, output)
        return 1
    done = run_all(arguments.parts, output, arguments.seconds - (time.monotonic() - start), more, done)
    print_end(done, output)
    return int(any(part["status"] in RED for part in done))


if __name__ == "__main__":
    raise SystemExit(main())
