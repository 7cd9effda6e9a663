"""The kernels in ``kernels/``, compiled with CUTLASS's headers."""

import functools
from pathlib import Path

import pytest

import hoppersim

KERNELS = Path(__file__).parent / "kernels"


def cutlass_source() -> Path | None:
    """The folder that holds CUTLASS's ``include``."""
    include = hoppersim.cutlass_include()
    return include and include.parent


@functools.cache
def library(name: str, *flags: str) -> hoppersim.Library:
    """Compiles ``kernels/<name>.cu``; skips the test where CUTLASS's headers are not."""
    cutlass = hoppersim.cutlass_include()
    if cutlass is None:
        pytest.skip("needs CUTLASS 4.2 headers: pip install --no-deps nvidia-cutlass==4.2.0.0, or set CUTLASS_PATH")
    include = (cutlass, cutlass.parent / "tools" / "util" / "include")
    return hoppersim.compile_cuda(
        KERNELS / f"{name}.cu", include_dirs=include, flags=("--expt-relaxed-constexpr", "-DNDEBUG", *flags)
    )
