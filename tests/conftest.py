"""Where `reference` is found, and how much hypothesis tries: HYPOTHESIS_PROFILE=thorough tries ten times as much, gpu
little and always the same.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import machine

machine.spin_shortly()  # before anything imports torch

import pytest
from hypothesis import HealthCheck, settings

# A failing example prints the line that reproduces it; every example draws its tensors from a seed that is printed too.
# Timing limits say nothing on a shared machine.
settings.register_profile(
    "default", max_examples=30, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=300)
settings.register_profile("gpu", settings.get_profile("default"), max_examples=4, derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


BUSY = "durations say little, and a test with a time limit may miss it"


def pytest_report_header():
    return machine.busy_notice(machine.processors(), BUSY) or []


def pytest_terminal_summary(terminalreporter):
    if notice := machine.busy_notice(machine.processors(), BUSY):
        terminalreporter.write_line(notice)


def pytest_collection_modifyitems(items):
    # The simulator puts an allocator under torch for the rest of the process: what uses it comes last.
    items.sort(key=lambda item: item.get_closest_marker("simulator") is not None)


@pytest.fixture(autouse=True)
def simulated_memory(request):
    """A test marked `simulator` makes its tensors in memory that the simulator knows."""
    if request.node.get_closest_marker("simulator") is not None:
        from support.device_backends import hoppersim

        hoppersim.jet_sim()
