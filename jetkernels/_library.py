"""Loads the compiled op library. Imported first by everything in ``jetkernels.ops``.

JETKERNELS_LIBRARY names another one than ``libjetkernels.so``, for example one whose waits have a watchdog.
"""

import ctypes
import json
import os
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent

path = Path(os.environ.get("JETKERNELS_LIBRARY") or _PACKAGE / "libjetkernels.so").resolve()
ptxas_report = _PACKAGE / "ptxas_report.txt"

if not path.exists():
    if os.environ.get("JETKERNELS_LIBRARY"):
        raise ImportError(
            f"JETKERNELS_LIBRARY names {path}, which does not exist; without it libjetkernels.so of the package is loaded"
        )
    raise ImportError(
        "jetkernels is not built: run `pip install --no-build-isolation -e .` in the repository, "
        "or `python3 dev.py test`, which sets everything up"
    )
try:
    torch.ops.load_library(str(path))
except OSError as error:
    raise ImportError(
        f"jetkernels needs PyTorch 2.11 or newer, and {path} does not load with {torch.__version__}: {error}"
    ) from None
_functions = ctypes.CDLL(str(path))  # the same one; of bindings/introspection.cpp
if not hasattr(_functions, "jetkernels_build_info"):
    raise ImportError(f"{path} is no library of this version of jetkernels: build it again")
_functions.jetkernels_build_info.restype = ctypes.c_char_p
_functions.jetkernels_plain_reason_text.restype = ctypes.c_char_p
_functions.jetkernels_plain_reason_text.argtypes = [ctypes.c_int64]
_functions.jetkernels_plain_reason.restype = ctypes.c_char_p
_functions.jetkernels_plain_reason.argtypes = [ctypes.c_char_p, ctypes.c_int]


def build_info() -> dict:
    """The build's ``torch``, ``compiler``, ``cpu_isas`` and ``cuda_architectures``, and ``cpu_isa``, the one in use."""
    return json.loads(_functions.jetkernels_build_info())


def plain_reason_text(code: int) -> str:
    """The reason that the bindings pass to the plain PyTorch path, as text."""
    return _functions.jetkernels_plain_reason_text(code).decode()


def plain_reason(op: str, device: int) -> str | None:
    """Why the plain PyTorch path serves an op on a CUDA device (-1: on a CPU); None if a kernel does.

    Single calls may differ on a CUDA device: for shapes that the kernel does not take.
    """
    reason = _functions.jetkernels_plain_reason(op.encode(), device)
    return None if reason is None else reason.decode()


def empty_launch(stream: int) -> int:
    """Launches an empty kernel on a CUDA stream; returns the cudaError_t. For a library with CUDA kernels."""
    return _functions.jetkernels_empty_launch(ctypes.c_void_p(stream))


def _check_environment() -> None:
    allowed = {
        "JETKERNELS_BACKEND": ["plain"],
        "JETKERNELS_CHECK": ["0", "1"],
        "JETKERNELS_CPU_ISA": build_info()["cpu_isas"],
    }
    for name, values in allowed.items():
        if (value := os.environ.get(name)) and value not in values:
            raise ImportError(f"{name} must be {' or '.join(values)} or unset, got {value!r}")


_check_environment()
