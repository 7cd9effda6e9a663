"""The simulator's tests need nvcc, which makes the PTX they run and brings the CUDA headers."""

from pathlib import Path

import pytest

import hoppersim

_FOLDER = Path(__file__).parent


def pytest_configure(config):
    config.addinivalue_line("markers", "simulator: runs on the simulator")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if _FOLDER in item.path.parents:
            item.add_marker("simulator")
            if hoppersim.nvcc() is None:
                item.add_marker(pytest.mark.skip(reason="hoppersim needs nvcc on PATH or under CUDA_HOME"))


@pytest.fixture(autouse=True)
def no_fault_left_behind():
    """A fault that the runtime kept and nobody asked for fails the test that caused it."""
    yield
    if hoppersim.nvcc() is not None:
        with hoppersim.simulate():
            pass
