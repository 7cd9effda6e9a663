"""The backends of a campaign. Each runs in a process of its own: the CPU variant is chosen when the library is first
used.
"""

import ctypes
import os
import platform
import random
from collections.abc import Callable
from functools import cache

import torch
from support.backends import OpsBackend, PlainBackend
from support.device_backends import CudaBackend, SimulatorBackend, has_hopper
from support.jet_sim import jet_sim

import hoppersim
from jetkernels import _library

NAMES = ("cpu-generic", "cpu-avx2", "cpu-avx512", "plain", "simulator", "cuda")


class Cpu(OpsBackend):
    """The CPU library, for the instruction set that this process was started with."""

    name = "cpu"


class _Simulator(SimulatorBackend):
    """Each case has a schedule of its own."""

    def __init__(self, choice: random.Random):
        super().__init__(choice.choice(("early", "late")), choice.randint(0, 1 << 20))


def here() -> tuple[str, ...]:
    """The backends that this machine can run."""
    cpu = [name for name in NAMES if name.startswith("cpu") and _isa_is_here(name.removeprefix("cpu-"))]
    return (*cpu, "plain", *(["simulator"] if hoppersim.nvcc() else []), *(["cuda"] if has_hopper() else []))


def _isa_is_here(isa: str) -> bool:
    if isa == "generic":
        return True
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    best = torch.backends.cpu.get_cpu_capability()
    return best in (("AVX2", "AVX512") if isa == "avx2" else ("AVX512",))


def takes_kernels_only(name: str) -> bool:
    """Of a backend of a campaign, or of an instance of it."""
    return name.partition("-")[0] in ("simulator", "cuda")


def start(name: str) -> None:
    """Before the first call in this process."""
    if name.startswith("cpu"):
        os.environ["JETKERNELS_CPU_ISA"] = name.removeprefix("cpu-")
    if name == "simulator":
        jet_sim()


def backend_of(name: str, choice: random.Random) -> OpsBackend:
    if name == "simulator":
        return _Simulator(choice)
    return {"plain": PlainBackend, "cuda": CudaBackend}.get(name, Cpu)()


@cache
def _set_threads() -> Callable[[int], None]:
    return getattr(ctypes.CDLL(str(_library.path)), "jet_fuzz_set_num_threads", torch.set_num_threads)


def set_threads(threads: int) -> None:
    """For the ops of this library; where ThreadSanitizer watches it, torch keeps one thread (parallel_for.cpp)."""
    _set_threads()(threads)
