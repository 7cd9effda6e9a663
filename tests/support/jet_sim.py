"""torch.ops.jet_sim: the library's ops with its Hopper kernels on the simulator."""

import ctypes
import functools
from pathlib import Path

from support.paths import TESTS

import hoppersim


@functools.cache
def build() -> Path:
    """Builds the library's bindings and kernels for the simulator, and the allocator of CPU tensors."""
    folder = hoppersim.build_folder() / "jet_sim"
    where = f"-DHOPPERSIM_LIBRARY_FOLDER={hoppersim.library_folder()}"
    hoppersim.build_with_cmake(TESTS / "simulated", folder, "all", where)
    return folder


@functools.cache
def library() -> hoppersim.Library:
    """The library that `jet_sim` calls."""
    return hoppersim.Library(build() / "libjet_sim.so")


@functools.cache
def jet_sim():
    """``torch.ops.jet_sim``: the library's ops, their schemas and plain paths, with CPU tensors on the simulated
    device.

    Tensors that torch allocates from now on are registered, so kernels are held to their bounds.
    """
    import torch

    from jetkernels import ops  # defines the schemas and the plain paths

    fragment = torch.library.Library("jet_sim", "FRAGMENT")
    for name in ops._register.defined:
        schema = str(getattr(torch.ops.jet, name).default._schema)
        fragment.define(schema.removeprefix("jet::"))
    jet_sim.schemas = fragment  # the definitions live as long as this object
    library()  # the simulator with it
    ctypes.CDLL(str(build() / "libhoppersim_torch.so"))
    return torch.ops.jet_sim
