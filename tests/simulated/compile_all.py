"""Compiles all that tests run on the simulator. tests/conftest.py starts it beside the tests that need none of it."""

import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "hoppersim")]

import kernel_library  # noqa: E402
from support import jet_sim  # noqa: E402


def main() -> None:
    jet_sim.build()
    for source in sorted(kernel_library.KERNELS.glob("*.cu")):
        kernel_library.library(source.stem)


if __name__ == "__main__":
    main()
