"""Make the library importable on a machine: as it was brought along, else built there with nvcc.

    python -m benchmarks.gpu_run.library

makes jetkernels/libjetkernels.so, unless the one that is there has CUDA kernels and loads; with --watchdog it makes
libjetkernels_watchdog.so, in which a wait of more than 2 s ends the kernel.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import ROOT

NEEDS_LIBRARY = False
PACKAGE = ROOT / "jetkernels"
LIBRARY = PACKAGE / "libjetkernels.so"
WATCHDOG = PACKAGE / "libjetkernels_watchdog.so"
BUILD = ROOT / "build" / "gpu_run"


def describe() -> list[str]:
    return [
        "the library: as brought along (jetkernels/libjetkernels.so), else built for sm_90a with nvcc",
        f"smoke and tests use {WATCHDOG.name} where it is: a dead-lock ends after 2 s and says where it was",
    ]


def jobs(settings: dict) -> list:
    from benchmarks.gpu_run.supervisor import Job

    return [Job("library", ("library",))]


def work(case: str, context) -> dict[str, object]:
    from benchmarks.provenance import provenance

    start = time.monotonic()
    step, what = make_usable()
    facts = provenance("python -m benchmarks.gpu_run", context.device)
    found = {
        "step": step,
        "what": what,
        "seconds": time.monotonic() - start,
        "provenance": facts | {"command": context.settings.get("command", "")},
    }
    return found if step else {**found, "failed": what}


def build_info() -> dict | str:
    """What a fresh process finds, or why the import fails."""
    script = "import json; from jetkernels import _library; print(json.dumps(_library.build_info()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def tool(name: str) -> str:
    beside = shutil.which(name, path=os.path.dirname(sys.executable)) or shutil.which(name)
    if beside is None:
        raise FileNotFoundError(f"{name} is needed to build the library and is not on PATH")
    return beside


def execute(*command: str) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def configure(build: Path, *options: str) -> None:
    tools = [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    execute(tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *tools, *options)


def build_everything() -> None:
    configure(BUILD, "-DJETKERNELS_BUILD=cuda")
    execute(tool("cmake"), "--build", str(BUILD))
    execute(tool("cmake"), "--install", str(BUILD), "--prefix", str(PACKAGE))


def build_watchdog() -> None:
    """Beside the library that times are taken with, and loaded in its place where JETKERNELS_LIBRARY names it."""
    build = BUILD / "watchdog"  # not build/*/cuda: tests of the machine code look for objects there
    configure(build, "-DJETKERNELS_BUILD=cuda", "-DJETKERNELS_WATCHDOG=ON")
    execute(tool("cmake"), "--build", str(build), "--target", "jetkernels")
    shutil.copy2(build / LIBRARY.name, WATCHDOG)


def make_usable() -> tuple[str, str]:
    """(the step that did it, what there is now), or ("", why there is no library)."""
    steps = {"as brought along": lambda: None, "built here": build_everything}
    reasons = []
    for step, make in steps.items():
        try:
            make()
        except Exception as error:  # the next step may do
            reasons.append(f"{step}: {type(error).__name__}: {error}"[:300])
            continue
        info = build_info()
        if isinstance(info, dict) and info["cuda_architectures"]:
            return step, f"{info['compiler']}, {', '.join(info['cuda_architectures'])}"
        reasons.append(f"{step}: {'it was built without CUDA' if isinstance(info, dict) else info}")
    return "", "no library with CUDA kernels could be imported. " + "; ".join(reasons)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run.library", description=__doc__.splitlines()[0])
    parser.add_argument("--watchdog", action="store_true", help="build the library whose waits have a watchdog")
    arguments = parser.parse_args()
    if arguments.watchdog:
        build_watchdog()
        print(f"written: {WATCHDOG}")
        return
    step, what = make_usable()
    print(f"{step or 'no library'}: {what}")
    raise SystemExit(not step)


if __name__ == "__main__":
    main()
