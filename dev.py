"""Sets everything up in .venv (pinned dependencies, build) and runs one thing in it. Needs Python 3.11+, pip and a C++
compiler.

python3 dev.py demo [arguments of `jetkernels demo`]
python3 dev.py test [arguments of pytest]
python3 dev.py run  COMMAND ...      (any command inside the environment, e.g. `python -m benchmarks.run --device cpu`)
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parent.resolve()
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / "python"
# CUTLASS's headers, which the Hopper kernels include; what its Python side depends on is not needed.
WITHOUT_DEPENDENCIES = "nvidia-cutlass==4.2.0.0"


def say(text: str) -> None:
    print(f"[dev.py] {text}", flush=True)


def pip(*arguments: str) -> None:
    # pip of the outer Python installs into .venv, so a Python without ensurepip (Debian without python3-venv) works
    # too.
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(PYTHON),
        "install",
        "--quiet",
        "--no-compile",
        "--disable-pip-version-check",
    ]
    if subprocess.run([*command, *arguments], cwd=ROOT).returncode != 0:
        sys.exit(f"[dev.py] pip could not install {' '.join(arguments)}; its last lines above say why")


def set_up() -> None:
    if sys.version_info < (3, 11):
        sys.exit(
            f"[dev.py] needs Python 3.11 or newer, this is {sys.version.split()[0]}: run it as python3.11 dev.py (or newer)"
        )
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
    say("building jetkernels")
    pip("--no-build-isolation", "--no-deps", "-e", ".")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in ("demo", "test", "run"):
        sys.exit(__doc__.strip())
    what, arguments = sys.argv[1], sys.argv[2:]
    if what == "run" and not arguments:
        sys.exit("[dev.py] run needs a command, e.g. python3 dev.py run python -m benchmarks.run --device cpu")
    set_up()
    command = {
        "demo": [str(PYTHON), "-m", "jetkernels", "demo", *arguments],
        "test": [str(PYTHON), "-m", "pytest", *arguments],
        "run": arguments,
    }[what]
    environment = {**os.environ, "VIRTUAL_ENV": str(VENV), "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
    say(
        "running "
        + " ".join(
            ["jetkernels demo", *arguments]
            if what == "demo"
            else ["pytest", *arguments]
            if what == "test"
            else arguments
        )
    )
    sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
