#!/usr/bin/env python3
"""The development commands. Each makes .venv with the pinned requirements, if they changed, and builds what it needs.

  python3 dev.py demo [ARGUMENTS of `jetkernels demo`]
  python3 dev.py test [ARGUMENTS of pytest]
  python3 dev.py lint [--fix]                           ruff, clang-format, mypy; --fix writes what they can mend
  python3 dev.py docs                                   builds the site and says where it is; a warning is an error
  python3 dev.py run  COMMAND ...                       e.g. python -m benchmarks.run --device cpu

Parts of the tests (CONTRIBUTING.md):
  python3 dev.py test tests/ops                         a folder, or a file; -k NAME picks tests in it
  python3 dev.py test --fast                            the ops, the layers and the model on the CPU
  python3 dev.py test -m kernels                        the kernels, on the simulator (needs nvcc), or on a GPU
  python3 dev.py test -m simulator                      all that runs on the simulator, its own tests too
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.resolve()
VENV = ROOT / ".venv"
BIN = VENV / "bin"
PYTHON = BIN / "python"
# CUTLASS's headers, which the Hopper kernels include; what its Python side depends on is not needed.
WITHOUT_DEPENDENCIES = "nvidia-cutlass==4.2.0.0"
MOST_WORKERS = 4  # processes of pytest
SITE = "build/site"
BUILD_SITE = ("python", "-m", "sphinx", "-b", "html", "-W", "--keep-going", "--quiet", "docs")  # and the output folder
CXX_FOLDERS = ("csrc", "bindings", "tests", "hoppersim/src", "hoppersim/tests", "hoppersim/examples")
CXX_SUFFIXES = (".h", ".cuh", ".c", ".cpp", ".cu")


def say(text: str) -> None:
    print(f"[dev.py] {text}", flush=True)


def pip(*arguments: str) -> None:
    # pip of the outer Python installs into .venv, so a Python without ensurepip (Debian without python3-venv) works
    # too.
    command = [sys.executable, "-m", "pip", "--python", str(PYTHON), "install"]
    command += ["--quiet", "--no-compile", "--disable-pip-version-check"]
    if subprocess.run([*command, *arguments], cwd=ROOT).returncode != 0:
        sys.exit(f"[dev.py] pip could not install {' '.join(arguments)}; its last lines above say why")


def set_up() -> None:
    """Makes .venv, unless it holds these requirements already."""
    if sys.version_info < (3, 11):  # noqa: UP036  (says so to whoever runs it with an older one)
        version = sys.version.split()[0]
        sys.exit(f"[dev.py] needs Python 3.11 or newer, this is {version}: run it as python3.11 dev.py (or newer)")
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode != 0:
        sys.exit("[dev.py] needs pip: install it with `python3 -m ensurepip` or your system's python3-pip package")
    requirements = ROOT / "requirements.txt"
    facts = requirements.read_bytes() + WITHOUT_DEPENDENCIES.encode() + sys.version.encode()
    digest = hashlib.sha256(facts).hexdigest()
    stamp = VENV / "dev.py.stamp"
    if not stamp.exists() or stamp.read_text() != digest:
        say(f"creating {VENV.name} and installing pinned dependencies (once)")
        venv.create(VENV, clear=True, with_pip=False)
        pip("-r", str(requirements))
        pip("--no-deps", WITHOUT_DEPENDENCIES)
        stamp.write_text(digest)


def build() -> None:
    say("building jetkernels")
    pip("--no-build-isolation", "--no-deps", "-e", ".")


def run(*command: str, **variables: str) -> int:
    environment = {
        **os.environ,
        **variables,
        "VIRTUAL_ENV": str(VENV),
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def test(arguments: list[str]) -> int:
    """pytest, in several processes unless it was asked for a file or to stop for its user."""
    alone = ("-s", "-n", "--pdb", "--trace", "--co")
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(processors, MOST_WORKERS)
    if workers == 1 or any(a.startswith(alone) or Path(a.split("::")[0]).exists() for a in arguments):
        return run("python", "-m", "pytest", *arguments)
    # Processes share processors badly while OpenMP threads wait for each other.
    threads = os.environ.get("OMP_NUM_THREADS", str(processors // workers))
    shared = ("-n", str(workers), "--dist", "worksteal")
    return run("python", "-m", "pytest", *shared, *arguments, OMP_NUM_THREADS=threads)


def lint(fix: bool) -> int:
    """All four, whatever the first says."""
    sources = [str(p) for folder in CXX_FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in CXX_SUFFIXES]
    commands = {
        "ruff check": ["ruff", "check", "--quiet", *(["--fix"] if fix else [])],
        "ruff format": ["ruff", "format", "--quiet", *([] if fix else ["--diff"])],
        "clang-format": ["clang-format", *(["-i"] if fix else ["--dry-run", "-Werror"]), *sources],
        "mypy": ["mypy", "--no-error-summary"],
    }
    failed = [name for name, command in commands.items() if run(*command) != 0]
    more = "" if fix else "; `python3 dev.py lint --fix` mends what it can"
    say(f"lint: {', '.join(failed)} failed{more}" if failed else "lint: clean")
    return int(bool(failed))


def docs() -> int:
    failed = run(*BUILD_SITE, SITE)
    say("docs: failed" if failed else f"docs: open {SITE}/index.html")
    return failed


def main() -> int:
    what, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if what not in ("demo", "test", "lint", "docs", "run"):
        sys.exit(__doc__.strip())
    if what == "run" and not arguments:
        sys.exit("[dev.py] run needs a command, e.g. python3 dev.py run python -m benchmarks.run --device cpu")
    if what == "docs" and arguments:
        sys.exit(f"[dev.py] docs takes nothing, got {' '.join(arguments)}")
    if what == "lint" and arguments not in ([], ["--fix"]):
        sys.exit(f"[dev.py] lint takes --fix or nothing, got {' '.join(arguments)}")
    set_up()
    if what == "lint":
        return lint(fix=bool(arguments))
    build()
    if what == "docs":
        return docs()
    if what == "demo":
        arguments = ["python", "-m", "jetkernels", "demo", *arguments]
    elif what == "test":
        say(f"running pytest {' '.join(arguments)}")
        return test(arguments)
    say(f"running {' '.join(arguments)}")
    return run(*arguments)


if __name__ == "__main__":
    sys.exit(main())
