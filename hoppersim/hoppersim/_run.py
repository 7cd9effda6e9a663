"""A program as it is, on the simulated CUDA runtime: one process per run."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from ._native import library_folder


class CannotRun(Exception):
    """The program could not be run on the simulator; the text says why."""


@dataclass
class Run:
    """What one run told; the lists hold the lines that src/runtime_file.cpp writes."""

    seed: int
    timing: str
    status: int  # as subprocess has it: below zero a signal
    output: str | None  # None: it was passed on
    findings: list[dict] = field(default_factory=list)
    launches: list[dict] = field(default_factory=list)
    refusals: list[dict] = field(default_factory=list)
    modules: int = 0


def _runtime_folder() -> Path:
    return library_folder() / "runtime"


def _environment(program: str) -> dict[str, str]:
    """What makes the loader take the simulated runtime where the program asks for CUDA's."""
    folder = _runtime_folder()
    before = [os.environ[name] for name in ("LD_LIBRARY_PATH",) if os.environ.get(name)]
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join([str(folder), *before])}
    ldd = shutil.which("ldd")
    listed = subprocess.run([ldd, program], env=environment, capture_output=True, text=True).stdout if ldd else ""
    # A library path written into the program (RPATH) comes before LD_LIBRARY_PATH.
    found = re.findall(r"(libcudart\.so\.\d+|libcuda\.so\.1) => (\S+)", listed)
    elsewhere = [name for name, path in found if Path(path).parent != folder and (folder / name).exists()]
    if elsewhere:
        before = [os.environ["LD_PRELOAD"]] if os.environ.get("LD_PRELOAD") else []
        environment["LD_PRELOAD"] = ":".join([*(str(folder / name) for name in elsewhere), *before])
    return environment


def resolve(program: str) -> str:
    """The path of the program, found as a shell would."""
    path = shutil.which(program)
    if path is None:
        if Path(program).exists():
            raise CannotRun(f"{program} is not an executable file")
        beside = (
            f"; did you mean ./{program}?" if Path(program).name == program and Path(f"./{program}").exists() else ""
        )
        raise CannotRun(f"there is no program {program}{beside}")
    return path


def run(command: list[str], seed: int, timing: str, options: dict[str, str], *, pass_on: bool) -> Run:
    """Runs the command once; its output is passed on or kept. Its standard input is empty."""
    program = resolve(command[0])
    environment = _environment(program) | options | {"HOPPERSIM_SEED": str(seed), "HOPPERSIM_TIMING": timing}
    with tempfile.TemporaryDirectory(prefix="hoppersim-") as folder:
        report = Path(folder) / "report"
        environment["HOPPERSIM_REPORT"] = str(report)
        output = None if pass_on else subprocess.PIPE
        try:
            done = subprocess.run(
                command,
                executable=program,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if pass_on else subprocess.STDOUT,
            )
        except OSError as error:
            raise CannotRun(f"{program} does not start: {error.strerror}") from None
        lines = report.read_text(errors="replace").splitlines() if report.exists() else []
    result = Run(seed, timing, done.returncode, None if pass_on else done.stdout.decode(errors="replace"))
    for line in map(json.loads, lines):
        event = line.pop("event")
        if event == "module":
            result.modules += 1
        else:
            {"finding": result.findings, "launch": result.launches, "refusal": result.refusals}[event].append(line)
    return result
