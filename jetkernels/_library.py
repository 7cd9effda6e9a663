"""Loads the compiled op library. Imported first by everything in ``jetkernels.ops``."""

from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent

if not (_PACKAGE / "libjetkernels.so").exists():
    raise ImportError(
        "jetkernels is not built: run `pip install --no-build-isolation -e .` in the repository, "
        "or `python3 dev.py test`, which sets everything up"
    )
torch.ops.load_library(str(_PACKAGE / "libjetkernels.so"))

from jetkernels import _introspection  # noqa: E402  (needs the op library, which needs torch, loaded first)

build_info = _introspection.build_info
plain_reason = _introspection.plain_reason
plain_reason_text = _introspection.plain_reason_text
ptxas_report = _PACKAGE / "ptxas_report.txt"
