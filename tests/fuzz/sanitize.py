"""The CPU library under a sanitizer: built apart, bindings included, and loaded by the processes of a campaign.

The sanitizer first has to report faults that are planted on the way that ops go (planted.cpp): a run whose sanitizer is
blind is refused. Cases are looked at for their bits only: whether values are right does not need a sanitizer. Leaks are
not looked for: Python and torch keep what they have until the process is gone.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import ROOT, campaign
from .backends import here

FLAGS = {"address": "address,undefined", "thread": "thread"}
PLANTED = {"address": ("overflow", "undefined"), "thread": ("race",)}
RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # A report ends the process: the campaign then knows whose it is, and goes on behind it.
    "address": {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"},
    # Python and torch are not instrumented. torch keeps one thread; those of the ops are parallel_for.cpp's.
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1", "OMP_NUM_THREADS": "1"},
}
CALL_PLANTED = """
import ctypes, sys
from jetkernels import _library
library = ctypes.CDLL(str(_library.path))
if hasattr(library, "jet_fuzz_set_num_threads"):
    library.jet_fuzz_set_num_threads(4)
getattr(library, "jet_planted_" + sys.argv[1])()
"""


def build(kind: str) -> Path:
    """The library that ``kind`` watches; takes some minutes the first time."""
    folder = ROOT / "build" / f"sanitize-{kind}"
    settings = (
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DJETKERNELS_BUILD=cpu",
        f"-DJETKERNELS_SANITIZE={FLAGS[kind]}",
    )
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["-S", ROOT, "-B", folder, *generator, *settings],
        ["--build", folder, "--target", "jetkernels", "--parallel"],
    ):
        done = subprocess.run(
            ["cmake", *map(str, command)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode:
            raise SystemExit(f"the build for {kind} failed:\n{done.stdout[-3000:]}")
    return folder / "libjetkernels.so"


def launcher(kind: str, library: Path) -> list[str]:
    """What stands before a command that is to run with ``library``."""
    path = subprocess.run(
        ["gcc", f"-print-file-name={RUNTIME[kind]}"], check=True, text=True, stdout=subprocess.PIPE
    ).stdout.strip()
    settings = {"JETKERNELS_LIBRARY": library, "LD_PRELOAD": path, **OPTIONS[kind]}
    # GCC's TSan cannot place its shadow memory where addresses are as random as newer kernels make them.
    return ["setarch", "--addr-no-randomize", "env", *(f"{name}={value}" for name, value in settings.items())]


def report(printed: str) -> str:
    """The lines of a sanitizer's report that say what it is."""
    lines = [line.strip() for line in printed.splitlines()]
    found = [
        line
        for line in lines
        if line.startswith("SUMMARY:") or "runtime error:" in line or "WARNING: ThreadSanitizer" in line
    ]
    return " | ".join(found) or (lines or ["it printed nothing"])[-1]


def sees_planted(kind: str, before: Sequence[str]) -> None:
    for fault in PLANTED[kind]:
        command = [*before, sys.executable, "-c", CALL_PLANTED, fault]
        done = subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode == 0 or "planted" not in done.stdout:
            raise SystemExit(f"{FLAGS[kind]} does not see the planted fault '{fault}':\n{done.stdout[-3000:]}")
        print(f"planted '{fault}' seen: {report(done.stdout)}", flush=True)


def run(kind: str, op: str | None, first: int, cases: int | None, seconds: float) -> campaign.Summary:
    before = launcher(kind, build(kind))
    sees_planted(kind, before)
    cpus = [name for name in here() if name.startswith("cpu")]
    summary = campaign.run(cpus, op, first, cases, seconds, campaign.Process(before, report, values=False))
    sanitizer = [failure for failure in summary.failures if "process ended" in failure.reason]
    print(f"{FLAGS[kind]}: {len(sanitizer)} reports in {sum(summary.cases.values())} cases", flush=True)
    return summary
