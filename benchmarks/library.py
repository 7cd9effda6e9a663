"""Make the library importable on this machine: as it was brought along, else built with nvcc.

The op library does not depend on Python's version, the introspection module does: where only that does not fit, only that
is compiled.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from benchmarks import parts
from benchmarks.parts import Rows
from benchmarks.provenance import ROOT

PACKAGE = ROOT / "jetkernels"
LIBRARY = PACKAGE / "libjetkernels.so"
BUILD = ROOT / "build" / "on_gpu"


def describe() -> list[str]:
    return ["the library: as brought along (jetkernels/libjetkernels.so), else built for sm_90a with nvcc"]


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


def run(*command: str) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def configure(build: str) -> None:
    run(tool("cmake"), "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DJETKERNELS_BUILD={build}")  # fmt: skip


def build_everything() -> None:
    configure("cuda")
    run(tool("cmake"), "--build", str(BUILD))
    run(tool("cmake"), "--install", str(BUILD), "--prefix", str(PACKAGE))


def architectures_of(library: Path) -> list[str]:
    """The GPUs that a built library has machine code for: its fat binaries name them."""
    return sorted({name.decode() for name in re.findall(rb"\bsm_\d+[a-z]?\b", library.read_bytes())})


def build_introspection() -> None:
    """For this Python, against the op library that was brought along. CMake writes the facts that it reports."""
    import pybind11

    configure("cpu")  # compiles nothing, and needs neither nvcc nor CUTLASS
    facts = BUILD / "build_facts.h"
    architectures = "\\n".join(architectures_of(LIBRARY))
    facts.write_text(re.sub(r'(JET_BUILD_CUDA_ARCHITECTURES) "[^"]*"', lambda m: f'{m[1]} "{architectures}"', facts.read_text()))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    includes = (ROOT, BUILD, pybind11.get_include(), sysconfig.get_path("include"))
    run(tool(os.environ.get("CXX", "c++")), "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-DJET_WITH_CUDA=1",
        *(f"-I{path}" for path in includes), str(ROOT / "bindings" / "introspection.cpp"), str(LIBRARY), "-Wl,-rpath,$ORIGIN",
        "-o", str(PACKAGE / f"_introspection{suffix}"))  # fmt: skip


def has_cuda(info: dict | str) -> bool:
    return isinstance(info, dict) and bool(info["cuda_architectures"])


def make_usable(rows: Rows) -> None:
    steps = {"as it is": lambda: None}
    if LIBRARY.exists():
        steps["introspection module compiled, op library as brought along"] = build_introspection
    steps["built here"] = build_everything
    for step, work in steps.items():
        start = time.monotonic()
        try:
            work()
        except Exception as error:  # the next step may do
            rows.add(step=step, skipped=f"{type(error).__name__}: {error}"[:300])
            continue
        info = build_info()
        if has_cuda(info):
            rows.add(step=step, what=f"{info['compiler']}, {', '.join(info['cuda_architectures'])}", seconds=time.monotonic() - start)
            return
        rows.add(step=step, skipped="built without CUDA" if isinstance(info, dict) else info)
    rows.add(step="library", failed="no library with CUDA kernels could be imported; the lines above say why")


def main() -> None:
    arguments = parts.parser("library", __doc__).parse_args()
    rows = Rows(arguments.rows)
    make_usable(rows)
    raise SystemExit(parts.failed(rows.rows))


if __name__ == "__main__":
    main()
