"""Where `reference` is found, the lanes of tests, and how much hypothesis tries.

Lanes: ``pytest --fast`` is the ops, layers and model on the CPU; ``-m kernels`` the product's Hopper kernels, on the
simulator and on a GPU where there is one; ``-m simulator`` all that runs on the simulator, its own tests among it.
HYPOTHESIS_PROFILE=thorough tries 300 examples, few five, gpu little and always the same.
"""

import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import machine

machine.spin_shortly()  # before anything imports torch

# A failing example prints the line that reproduces it; every example draws its tensors from a seed that is printed too.
# Timing limits say nothing on a shared machine.
settings.register_profile(
    "default", max_examples=15, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=300)
settings.register_profile("few", settings.get_profile("default"), max_examples=5)
settings.register_profile("gpu", settings.get_profile("default"), max_examples=4, derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

TESTS = Path(__file__).parent
FAST = ("ops", "layers", "model")  # folders
NOT_FAST = ("kernels", "simulator", "gpu", "slow")  # markers
COMPILING = pytest.StashKey[subprocess.Popen]()
BUSY = "durations say little, and a test with a time limit may miss it"


def pytest_addoption(parser):
    parser.addoption(
        "--fast",
        action="store_true",
        help=f"only tests/{{{','.join(FAST)}}}, without what is marked {', '.join(NOT_FAST)}",
    )


def pytest_report_header():
    return machine.busy_notice(machine.processors(), BUSY) or []


def pytest_terminal_summary(terminalreporter):
    if notice := machine.busy_notice(machine.processors(), BUSY):
        terminalreporter.write_line(notice)


def folder_of(path: Path) -> str | None:
    """The folder below tests/ that ``path`` is in."""
    inside = path.relative_to(TESTS).parts if path.is_relative_to(TESTS) else ()
    return inside[0] if inside else None


def pytest_ignore_collect(collection_path, config):
    """With --fast the other folders are not even imported."""
    folder = folder_of(collection_path)
    return True if config.getoption("fast") and folder is not None and folder not in FAST else None


def turn(item) -> int:
    on_simulator, kernels = (item.get_closest_marker(name) is not None for name in ("simulator", "kernels"))
    return on_simulator + (on_simulator and kernels)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config, items):
    for item in items:
        folder = folder_of(item.path)
        if folder == "simulated":
            item.add_marker("simulator")
        elif folder == "kernels" or item.get_closest_marker("simulator") or item.get_closest_marker("gpu"):
            item.add_marker("kernels")
    if config.getoption("fast"):
        slow = [item for item in items if any(map(item.get_closest_marker, NOT_FAST))]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    # Kernels on the simulator come last: their tensors need an allocator under torch, which stays there for the rest of
    # the process. The simulator's own tests come before them and look at memory without it.
    items.sort(key=turn)


def pytest_collection_finish(session):
    """What runs on the simulator comes last, so it is compiled while other tests run."""
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") != "gw0":
        return  # another worker does
    on_simulator = [item.get_closest_marker("simulator") is not None for item in session.items]
    if any(on_simulator) and not all(on_simulator) and not session.config.option.collectonly and os.name == "posix":
        import hoppersim

        if hoppersim.nvcc() is not None:
            session.config.stash[COMPILING] = subprocess.Popen(
                ["nice", "-n", "19", sys.executable, TESTS / "simulated" / "compile_all.py"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # what fails is compiled again, and told, by the first test that needs it
                start_new_session=True,
            )


def pytest_unconfigure(config):
    compiling = config.stash.get(COMPILING, None)
    if compiling is not None and compiling.poll() is None:
        os.killpg(compiling.pid, signal.SIGTERM)  # cmake, ninja and nvcc with it


@pytest.fixture(autouse=True)
def simulated_memory(request):
    """A test of a kernel on the simulator makes its tensors in memory that the simulator knows."""
    if request.node.get_closest_marker("simulator") and request.node.get_closest_marker("kernels"):
        from support.jet_sim import jet_sim

        jet_sim()


@pytest.fixture(autouse=True)
def draws_follow_from_the_name(request):
    """What a test draws from torch's own generator does not depend on the tests before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def threads_stay():
    """Bits of PyTorch's own products follow from their number, which a test may have changed."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    yield
    if before is not None and sys.modules["torch"].get_num_threads() != before:
        sys.modules["torch"].set_num_threads(before)


@pytest.fixture(autouse=True)
def nothing_stays_compiled():
    """torch.compile makes at most eight versions of a function, and those of earlier tests would count."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.convert_frame.input_codes.seen:
        dynamo.reset()
