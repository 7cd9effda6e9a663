"""Where the compiled simulator is, and its building in a checkout."""

import contextlib
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

_PACKAGE = Path(__file__).parent
_INSTALLED = _PACKAGE / "lib"  # of an installed package; a checkout builds for itself
_PROJECT = _PACKAGE.parent


def build_folder() -> Path:
    """What is built and compiled goes here: HOPPERSIM_BUILD, or `build` of a checkout, or the user's cache."""
    if named := os.environ.get("HOPPERSIM_BUILD"):
        return Path(named)
    if not _INSTALLED.exists():
        return _PROJECT / "build"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hoppersim"


def _tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"hoppersim needs {name}: install it beside {sys.executable} or put it on PATH")
    return found


def nvcc() -> str | None:
    """Path of nvcc, or None: without it nothing here can be built."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [f"{home}/bin/nvcc" for home in homes if home] + [shutil.which("nvcc")]
    return next((path for path in candidates if path and Path(path).exists()), None)


def run(command: list[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{what} failed: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


@contextlib.contextmanager
def lock(name: str):
    """One process at a time: several test processes may ask for the same build."""
    import fcntl

    locks = build_folder() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / name, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_with_cmake(source: Path, folder: Path, target: str, *definitions: str) -> None:
    """Configures a CMake project, anew for another Python, and builds one of its targets."""
    with lock(f"build-{folder.name}"):
        stamp = folder / "configured_for"
        facts = f"{sys.executable} {sys.version} {definitions}"
        if not stamp.exists() or stamp.read_text() != facts:
            python, ninja = f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"
            command = [_tool("cmake"), "--fresh", "-S", str(source), "-B", str(folder), "-G", "Ninja", python, ninja]
            run([*command, *definitions], f"configuring {source.name}")
            stamp.write_text(facts)
        run([_tool("cmake"), "--build", str(folder), "--target", target], f"building {target}")


@functools.cache
def library_folder() -> Path:
    """The folder of libhoppersim.so, which a checkout builds first (nothing to do: half a second)."""
    if _INSTALLED.exists():
        return _INSTALLED
    folder = build_folder() / "simulator"
    build_with_cmake(_PROJECT, folder, "all")
    return folder


@functools.cache
def native():
    """The compiled module."""
    path = library_folder() / f"_hoppersim{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_hoppersim", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
