"""The library's headers on the simulator need nvcc."""

from pathlib import Path

import pytest

import hoppersim

_FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if hoppersim.nvcc() is None:
        for item in items:
            if _FOLDER in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="the simulator needs nvcc on PATH or under CUDA_HOME"))


@pytest.fixture(autouse=True)
def no_fault_left_behind():
    """A fault that the runtime kept and nobody asked for fails the test that caused it."""
    yield
    if hoppersim.nvcc() is not None:
        with hoppersim.simulate():
            pass
