"""Runs Hopper kernels without a GPU: control of the simulator in ``tests/hoppersim/src``. Its README says what a pass
proves.

Environment: ``HOPPERSIM_BUILD`` names the build folder (default ``build/hoppersim``).
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

_FOLDER = Path(__file__).parent.parent
_ROOT = _FOLDER.parent.parent
BUILD = Path(os.environ.get("HOPPERSIM_BUILD", _ROOT / "build" / "hoppersim"))


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


def _run(command: list[str], what: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{what} failed: {' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


@contextlib.contextmanager
def _lock(name: str):
    """One process at a time: several test processes may ask for the same build."""
    import fcntl

    locks = BUILD / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with open(locks / name, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def build(target: str = "_hoppersim") -> Path:
    """Configures and builds the simulator (nothing to do: half a second). Returns the build folder.

    Targets: ``_hoppersim``, ``jet_sim`` (the library's bindings and kernels on it), ``hoppersim_torch`` (bounds of CPU
    tensors).
    """
    with _lock("build"):
        stamp = BUILD / "configured_for"
        facts = f"{sys.executable} {sys.version}"
        if not stamp.exists() or stamp.read_text() != facts:
            _run(
                [
                    _tool("cmake"),
                    "--fresh",
                    "-S",
                    str(_FOLDER),
                    "-B",
                    str(BUILD),
                    "-G",
                    "Ninja",
                    f"-DPython_EXECUTABLE={sys.executable}",
                    f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
                ],
                "configuring hoppersim",
            )
            stamp.write_text(facts)
        _run([_tool("cmake"), "--build", str(BUILD), "--target", target], f"building {target}")
    return BUILD


@functools.cache
def _native():
    path = build() / f"_hoppersim{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_hoppersim", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def __getattr__(name: str):
    if name == "Fault":  # the exception type: built on first use
        return _native().Fault
    raise AttributeError(name)


# ---- Arguments


def _extent(array) -> tuple[int, int]:
    """Address and bytes that a NumPy array or a CPU tensor spans."""
    if isinstance(array, np.ndarray):
        low, high = np.lib.array_utils.byte_bounds(array)
        return low, high - low
    if array.numel() == 0:
        return array.data_ptr(), 0
    span = 1 + sum((size - 1) * stride for size, stride in zip(array.shape, array.stride()))
    return array.data_ptr(), span * array.element_size()


def _is_array(value) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "data_ptr")


def _address(array) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


@contextlib.contextmanager
def registered(*arrays):
    """Kernels may touch these arrays (NumPy, CPU tensors; read-only NumPy arrays: only read them) while the block
    runs.
    """
    native = _native()
    ranges = {}
    for array in arrays:
        begin, size = _extent(array)
        if size:
            writable = not isinstance(array, np.ndarray) or array.flags.writeable
            known = ranges.get(begin, (0, False))
            ranges[begin] = (max(size, known[0]), writable or known[1])
    added = [begin for begin, (size, writable) in ranges.items() if native.add_range(begin, size, writable)]
    try:
        yield
    finally:
        for begin in added:
            native.remove_range(begin)


def _bits(value, size: int) -> bytes:
    if isinstance(value, bytes):
        raw = value
    elif _is_array(value):
        raw = struct.pack("<Q", _address(value))
    elif isinstance(value, float):
        raw = struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], value)
    elif isinstance(value, np.generic):
        raw = value.tobytes()
    else:
        raw = int(value).to_bytes(size, "little", signed=value < 0)
    if len(raw) != size:
        raise ValueError(f"argument {value!r} has {len(raw)} bytes, its parameter {size}")
    return raw


def _triple(value) -> tuple[int, int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values + (1,) * (3 - len(values))


# ---- Launches


class Module:
    """Kernels of a PTX text, launched directly. Raises Fault at once for text that is not modelled."""

    def __init__(self, ptx: str):
        self._module = _native().TextModule(ptx)

    @property
    def kernels(self) -> list[str]:
        return self._module.kernels()

    def launch(self, name: str, grid, block, args=(), *, cluster=(1, 1, 1), shared: int = 0) -> dict:
        """Runs one launch to its end; returns its counters.

        ``args``: arrays and tensors (their address is passed, and they may be touched), int, float, NumPy scalars and
        bytes, one per parameter. ``shared``: dynamic shared bytes.
        """
        parameters = self._module.parameters(name)
        if len(parameters) != len(args):
            raise ValueError(f"{name} takes {len(parameters)} arguments, got {len(args)}")
        packed = bytearray()
        for (_, offset, size), value in zip(parameters, args):
            packed += b"\0" * (offset - len(packed)) + _bits(value, size)
        with registered(*(a for a in args if _is_array(a))):
            self._module.launch(name, _triple(grid), _triple(block), bytes(packed), _triple(cluster), shared)
        return last_counters()

    def global_bytes(self, name: str) -> bytes:
        """Current contents of a .global or .const variable."""
        return self._module.global_bytes(name)


class Library:
    """A shared library of CUDA host code and kernels, linked against the simulated runtime."""

    def __init__(self, path: Path, source: Path | None = None, options: list[str] | None = None):
        _native()  # the simulator first: the library finds it loaded
        self.path, self.source, self.options = path, source, options
        self.cdll = ctypes.CDLL(str(path))

    def call(self, name: str, *args, restype=ctypes.c_int):
        """Calls an ``extern "C"`` function; arrays are passed as pointers and may be touched by kernels. Raises the
        Fault of a launch.

        int becomes int64_t, float becomes double; pass ctypes values for other types.
        """
        function = self.cdll[name]
        function.restype = restype
        converted = []
        for value in args:
            if _is_array(value):
                value = ctypes.c_void_p(_address(value))
            elif isinstance(value, int):
                value = ctypes.c_int64(value)
            elif isinstance(value, float):
                value = ctypes.c_double(value)
            converted.append(value)
        with registered(*(a for a in args if _is_array(a))):
            result = function(*converted)
        _native().raise_fault()
        return result

    def resources(self) -> dict[str, dict]:
        """What ptxas says of each kernel: registers per thread, spill_bytes, static_shared bytes. Keyed by mangled
        name.
        """
        report = _run(
            [nvcc(), *self.options, "-cubin", "-arch=sm_90a", "-Xptxas=-v", str(self.source), "-o", os.devnull], "ptxas"
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
            _native().set_registers(name, facts["registers"])


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
    folder = build() / "cuda"
    folder.mkdir(exist_ok=True)
    if isinstance(source, str) and "\n" in source:
        path = folder / f"{_digest(source)}.cu"
        path.write_text(source)
    else:
        path = Path(source).resolve()
    compiler = nvcc()
    options = ["-std=c++20", "-O3", *(f"-I{directory}" for directory in (_ROOT, *include_dirs)), *flags]
    name = f"{path.stem}-{_digest(path.read_bytes(), repr((str(path), compiler, options)))}"
    listed = folder / f"{name}.d"
    with _lock(name):
        current = _digest_of_files(listed) if listed.exists() else None
        library = folder / f"{name}-{current}.so"
        if current is None or not library.exists():
            partial = folder / f"{name}.partial"
            _run(
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
                    f"-L{BUILD}",
                    "-lhoppersim",
                    "-Xlinker",
                    f"-rpath={BUILD}",
                ],
                "nvcc",
            )
            library = folder / f"{name}-{_digest_of_files(listed)}.so"
            partial.rename(library)
    return Library(library, path, options)


@functools.cache
def jet_sim():
    """``torch.ops.jet_sim``: the library's ops, their schemas and plain paths, with CPU tensors on the simulated
    device.

    Tensors that torch allocates from now on are registered, so kernels are held to their bounds.
    """
    import torch

    from jetkernels import ops  # defines the schemas and the plain paths

    names = ops._register.defined
    build("jet_sim"), build("hoppersim_torch")
    _native()
    ctypes.CDLL(str(BUILD / "libhoppersim_torch.so"))
    library = torch.library.Library("jet_sim", "FRAGMENT")
    for name in names:
        schema = str(getattr(torch.ops.jet, name).default._schema)
        library.define(schema.removeprefix("jet::"))
    jet_sim.schemas = library  # the definitions live as long as this object
    jet_sim.library = Library(BUILD / "libjet_sim.so")
    return torch.ops.jet_sim


# ---- Control


@contextlib.contextmanager
def simulate(
    *,
    timing: str = "early",
    seed: int = 0,
    host_threads: int = 2,
    max_instructions: int = 20_000_000_000,
    check_global: bool = True,
):
    """Options of the launches in the block; raises at its end the Fault of a launch that the CUDA runtime only
    reported.

    ``timing``: asynchronous effects at once ("early") or as late as allowed ("late"). ``seed``: order of warps and
    CTAs, 0 in order.
    """
    native = _native()
    before = native.options()
    native.raise_fault()
    native.clear_launches()
    native.set_options(timing, seed, host_threads, max_instructions, check_global)
    try:
        yield
    except Exception as error:
        try:
            native.raise_fault()
        except native.Fault as fault:
            raise fault from error
        raise
    finally:
        native.set_options(**before)
    native.raise_fault()


def launches() -> list[dict]:
    """The launches since the start of the last ``simulate`` block: kernel, grid, block, cluster, shared bytes,
    counters.
    """
    return _native().launches()


def last_counters() -> dict:
    """Counters of the last launch."""
    records = launches()
    if not records:
        raise RuntimeError("nothing was launched since the last simulate() began")
    return records[-1]["counters"]
