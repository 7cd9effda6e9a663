"""Loads the compiled op library. Imported first by everything in ``jetkernels.ops``.

JETKERNELS_LIBRARY names another one than ``libjetkernels.so``, for example one whose waits have a watchdog. Both have the same
soname, so that the introspection module finds the one that is loaded.
"""

import os
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent

path = Path(os.environ.get("JETKERNELS_LIBRARY") or _PACKAGE / "libjetkernels.so").resolve()

if not path.exists():
    if os.environ.get("JETKERNELS_LIBRARY"):
        raise ImportError(f"JETKERNELS_LIBRARY names {path}, which does not exist; without it libjetkernels.so of the package is loaded")
    raise ImportError(
        "jetkernels is not built: run `pip install --no-build-isolation -e .` in the repository, "
        "or `python3 dev.py test`, which sets everything up"
    )
torch.ops.load_library(str(path))

from jetkernels import _introspection  # noqa: E402  (needs the op library, which needs torch, loaded first)

build_info = _introspection.build_info
plain_reason = _introspection.plain_reason
plain_reason_text = _introspection.plain_reason_text
ptxas_report = _PACKAGE / "ptxas_report.txt"
