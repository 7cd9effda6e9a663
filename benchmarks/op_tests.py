"""Run the op tests on the GPU: every test of the suite that is marked `gpu`."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks import parts
from benchmarks.parts import Rows
from benchmarks.provenance import ROOT

MARKER = "gpu"  # of pyproject.toml
WORKERS = 6  # processes, where pytest-xdist is installed


def describe() -> list[str]:
    return [f"pytest tests -m {MARKER}: every test of a kernel that also runs on the simulator, on the GPU"]


def command(report: Path, quick: bool = False) -> list[str]:
    found = [sys.executable, "-m", "pytest", "tests", "--ignore=tests/hoppersim", "-q", "-m", MARKER, f"--junitxml={report}"]
    found += ["-p", "no:cacheprovider", "--tb=short", "--maxfail=50"]
    if importlib.util.find_spec("xdist"):
        found += ["-n", str(WORKERS)]
    return [*found, "-x"] if quick else found


def by_file(report: Path) -> list[dict[str, object]]:
    """Rows of a JUnit report, one per test file."""
    files: dict[str, dict[str, object]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        file = case.get("classname", "").split(".")[1:2] or [case.get("classname", "")]
        row = files.setdefault(file[0], {"file": file[0], "passed": 0, "failures": 0, "not_run": 0, "seconds": 0.0})
        row["seconds"] += float(case.get("time", 0))
        tags = {child.tag for child in case}
        row["failures" if tags & {"failure", "error"} else "not_run" if "skipped" in tags else "passed"] += 1
    return list(files.values())


def run(rows: Rows, seconds: float, quick: bool = False) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
        process = subprocess.Popen(command(report, quick), cwd=ROOT, env=environment, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            parts.stop(process)
            rows.add(step="pytest", failed=f"not finished within {seconds:.0f} s")
            return
        found = by_file(report) if report.exists() else []
    for row in found:
        rows.add(**row)
    if not sum(row["passed"] + row["failures"] for row in found):
        rows.add(step="pytest", failed=f"no test ran on CUDA (exit code {code}): -m {MARKER} chose nothing that was not skipped")
    elif code != 0:
        rows.add(step="pytest", failed=f"exit code {code}: {sum(row['failures'] for row in found)} tests failed")


def main() -> None:
    import torch

    arguments = parts.parser("op_tests", __doc__).parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device")
        raise SystemExit(parts.SKIPPED)
    rows = Rows(arguments.rows)
    run(rows, arguments.seconds, arguments.quick)
    raise SystemExit(parts.failed(rows.rows))


if __name__ == "__main__":
    main()
