"""Loads the compiled op library. Imported first by everything in ``jetkernels.ops``.

JETKERNELS_LIBRARY names another one than ``libjetkernels.so``, for example one whose waits have a watchdog.
"""

import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parent

path = Path(os.environ.get("JETKERNELS_LIBRARY") or _PACKAGE / "libjetkernels.so").resolve()

if not path.exists():
    if os.environ.get("JETKERNELS_LIBRARY"):
        raise ImportError(
            f"JETKERNELS_LIBRARY names {path}, which does not exist; "
            "without it libjetkernels.so of the package is loaded"
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
_functions = ctypes.CDLL(str(path))  # the same one; bindings/introspection.cpp and backend.cpp
if not all(hasattr(_functions, name) for name in ("jetkernels_build_info", "jetkernels_ask_backend")):
    raise ImportError(f"{path} is no library of this version of jetkernels: build it again")
_functions.jetkernels_build_info.restype = ctypes.c_char_p
_functions.jetkernels_plain_reason_text.restype = ctypes.c_char_p
_functions.jetkernels_plain_reason_text.argtypes = [ctypes.c_int64]


PLAIN_ASKED = 4  # PlainReason::asked


def build_info() -> dict[str, Any]:
    """The build's ``torch``, ``compiler``, ``cpu_isas`` and ``cuda_architectures``; ``cpu_isa``, ``cpu_amx`` in use."""
    return json.loads(_functions.jetkernels_build_info())


def plain_reason_text(code: int) -> str:
    """The reason that the bindings pass to the plain PyTorch path, as text."""
    return _functions.jetkernels_plain_reason_text(code).decode()


def ask_backend(call: Callable[[], object], library: ctypes.CDLL = _functions) -> dict[str, str] | None:
    """Who would serve the op that ``call`` calls: the call ends where its binding decides that, and nothing is written.

    Args:
        call: calls one op of ``library`` on this thread.
        library: the loaded library that holds the op's binding.

    Returns:
        ``name`` and ``detail`` as in :class:`jetkernels.Backend`; ``None`` if no binding was called.

    Raises:
        Exception: what the op raises for a wrong argument.
    """
    library.jetkernels_backend_asked.restype = ctypes.c_char_p
    answer, refused = None, None
    try:
        library.jetkernels_ask_backend()
        call()
    except Exception as error:
        refused = error
    finally:
        answer = library.jetkernels_backend_asked()
    if answer is not None:
        return json.loads(answer)
    if refused is not None:
        raise refused
    return None


def empty_launch(stream: int) -> int:
    """Launches an empty kernel on a CUDA stream; returns the cudaError_t. For a library with CUDA kernels."""
    return _functions.jetkernels_empty_launch(ctypes.c_void_p(stream))


def _check_environment() -> None:
    allowed = {
        "JETKERNELS_BACKEND": ["plain"],
        "JETKERNELS_CHECK": ["0", "1"],
        "JETKERNELS_CPU_ISA": build_info()["cpu_isas"],
        "JETKERNELS_FLA": ["0", "1"],
    }
    for name, values in allowed.items():
        if (value := os.environ.get(name)) and value not in values:
            raise ImportError(f"{name} must be {' or '.join(values)} or unset, got {value!r}")


_check_environment()
