"""The simulator's tests need nvcc, which makes the PTX they run and brings the CUDA headers."""

from pathlib import Path

import hoppersim
import pytest

_FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if hoppersim.nvcc() is None:
        for item in items:
            if _FOLDER in item.path.parents:
                item.add_marker(
                    pytest.mark.skip(reason="hoppersim needs nvcc (CUDA 13.0 was used) on PATH or under CUDA_HOME")
                )


@pytest.fixture(autouse=True)
def no_fault_left_behind():
    """A fault that the runtime kept and nobody asked for fails the test that caused it."""
    yield
    if hoppersim.nvcc() is not None:
        with hoppersim.simulate():
            pass
