"""CUDA sources compiled for the simulator."""

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
from pathlib import Path

from ._launch import address, is_array, registered
from ._native import build_folder, library_folder, lock, native, nvcc, run


def _compiler() -> str:
    path = nvcc()
    if path is None:
        raise RuntimeError("hoppersim compiles CUDA sources with nvcc: put it on PATH, or set CUDA_HOME to its toolkit")
    return path


class Library:
    """A shared library of CUDA host code and kernels, linked against the simulated runtime."""

    def __init__(self, path: Path, source: Path | None = None, options: list[str] | None = None):
        native()  # the simulator first: the library finds it loaded
        self.path, self.source, self.options = path, source, options
        self.cdll = ctypes.CDLL(str(path))

    def call(self, name: str, *args, restype=ctypes.c_int):
        """Calls an ``extern "C"`` function, and raises the Fault of a launch in it.

        Arrays are passed as pointers and may be touched by kernels. int becomes int64_t, float becomes double; pass
        ctypes values for other types.
        """
        function = self.cdll[name]
        function.restype = restype
        converted = []
        for value in args:
            if is_array(value):
                value = ctypes.c_void_p(address(value))
            elif isinstance(value, int):
                value = ctypes.c_int64(value)
            elif isinstance(value, float):
                value = ctypes.c_double(value)
            converted.append(value)
        with registered(*(a for a in args if is_array(a))):
            result = function(*converted)
        native().raise_fault()
        return result

    def resources(self) -> dict[str, dict]:
        """What ptxas says of each kernel, by mangled name: registers per thread, spill_bytes, static_shared bytes."""
        report = run(
            [_compiler(), *self.options, "-cubin", "-arch=sm_90a", "-Xptxas=-v", str(self.source), "-o", os.devnull],
            "ptxas",
        )
        kernels, name = {}, None
        for line in report.splitlines():
            if match := re.search(r"Compiling entry function '(\w+)'", line):
                name = match[1]
                kernels[name] = {"registers": 0, "spill_bytes": 0, "static_shared": 0}
            elif name and (match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)):
                kernels[name]["spill_bytes"] = int(match[1]) + int(match[2])
            elif name and (match := re.search(r"Used (\d+) registers", line)):
                kernels[name]["registers"] = int(match[1])
                if match := re.search(r"(\d+) bytes smem", line):
                    kernels[name]["static_shared"] = int(match[1])
        return kernels

    def use_compiler_report(self) -> None:
        """Holds launches and occupancy to the registers that ptxas really allocates."""
        for name, facts in self.resources().items():
            native().set_registers(name, facts["registers"])


def _digest(*parts: bytes | str) -> str:
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part if isinstance(part, bytes) else part.encode())
        hashed.update(b"\0")
    return hashed.hexdigest()[:16]


def _digest_of_files(listed: Path) -> str | None:
    """Digest of every file named in a dependency file that the compiler wrote; None if one is gone."""
    words = listed.read_text().replace("\\\n", " ").split()[1:]
    try:
        return _digest(*(Path(word).read_bytes() for word in words if word != ":"))
    except FileNotFoundError:
        return None


def compile_cuda(source, *, include_dirs=(), flags=()) -> Library:
    """Compiles a .cu (a path, or the source itself) with its PTX embedded and loads it on the simulator.

    Cached in the build folder by the contents of the source and of every header that it includes.
    """
    folder = build_folder() / "cuda"
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(source, str) and "\n" in source:
        path = folder / f"{_digest(source)}.cu"
        path.write_text(source)
    else:
        path = Path(source).resolve()
    compiler = _compiler()
    options = ["-std=c++20", "-O3", *(f"-I{directory}" for directory in include_dirs), *flags]
    name = f"{path.stem}-{_digest(path.read_bytes(), repr((str(path), compiler, options)))}"
    listed = folder / f"{name}.d"
    with lock(name):
        current = _digest_of_files(listed) if listed.exists() else None
        library = folder / f"{name}-{current}.so"
        if current is None or not library.exists():
            partial = folder / f"{name}.partial"
            run(
                [
                    compiler,
                    *options,
                    "-gencode",
                    "arch=compute_90a,code=compute_90a",
                    "--no-compress",
                    "-cudart",
                    "none",
                    "-shared",
                    "-Xcompiler",
                    "-fPIC",
                    "-MD",
                    "-MF",
                    str(listed),
                    str(path),
                    "-o",
                    str(partial),
                    f"-L{library_folder()}",
                    "-lhoppersim",
                    "-Xlinker",
                    f"-rpath={library_folder()}",
                ],
                "nvcc",
            )
            library = folder / f"{name}-{_digest_of_files(listed)}.so"
            partial.rename(library)
    return Library(library, path, options)


@functools.cache
def cutlass_include() -> Path | None:
    """The folder of CUTLASS's headers: of $CUTLASS_PATH, or of the installed package nvidia-cutlass; None without."""
    named = os.environ.get("CUTLASS_PATH")
    package = importlib.util.find_spec("cutlass_library")
    candidates = [Path(named)] if named else []
    candidates += [Path(folder) / "source" for folder in (package.submodule_search_locations if package else [])]
    found = (path / "include" for path in candidates)
    return next((path for path in found if (path / "cute" / "config.hpp").exists()), None)
