"""Compiles all that tests run on the simulator. tests/conftest.py starts it beside the tests that need none of it."""

import hoppersim
import kernel_library


def main() -> None:
    for target in ("_hoppersim", "jet_sim", "hoppersim_torch"):
        hoppersim.build(target)
    for source in sorted(kernel_library.KERNELS.glob("*.cu")):
        kernel_library.library(source.stem)


if __name__ == "__main__":
    main()
