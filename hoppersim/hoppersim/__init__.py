"""A functional simulator of sm_90a: runs the PTX of Hopper kernels without a GPU, and reports their hazards.

Its README says what a pass proves. Environment: ``HOPPERSIM_BUILD`` names the folder for what is built.
"""

from . import mutate as mutate
from ._compile import Library as Library
from ._compile import compile_cuda as compile_cuda
from ._compile import cutlass_include as cutlass_include
from ._control import kinds as _kinds
from ._control import last_counters as last_counters
from ._control import launches as launches
from ._control import reports as reports
from ._control import simulate as simulate
from ._edit import edited as edited
from ._edit import ptx_of as ptx_of
from ._launch import Module as Module
from ._launch import registered as registered
from ._native import build_folder as build_folder
from ._native import build_with_cmake as build_with_cmake
from ._native import library_folder as library_folder
from ._native import native as _native
from ._native import nvcc as nvcc


def __getattr__(name: str):
    if name == "Fault":  # the exception type: built on first use
        return _native().Fault
    if name == "KINDS":
        return _kinds()
    raise AttributeError(name)
