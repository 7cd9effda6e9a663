"""Where the Hopper kernels run in tests: on the simulator where nvcc is found, and on a GPU where there is one.

Both take CPU tensors and give CPU tensors, so that kernels run the cases and properties of the CPU ops.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import pytest
import torch
from support.backends import OpsBackend
from support.comparison import assert_bitwise
from support.jet_sim import jet_sim
from torch import Tensor

import hoppersim
import jetkernels

SEEDS = (1, 2, 3)
# RMS error of the states that the chunked kernels leave, in fp32: their operands are fp16.
CHUNK_STATE_CEILING = 1.2e-3


class DeviceBackend(OpsBackend):
    """Gradients by the backward op itself: kernels have no autograd of their own."""

    def gradients(self, op: str, inputs: NamedTuple, grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
        found = self(op + "_backward", *grads, *inputs)
        return {name: grad for name, value, grad in zip(inputs._fields, inputs, found) if value is not None}


class SimulatorBackend(DeviceBackend):
    """torch.ops.jet_sim: the library's bindings, launchers and kernels on the simulated device."""

    def __init__(self, timing: str, seed: int):
        self.name = f"simulator-{timing}-{seed}"
        self.timing, self.seed = timing, seed

    @property
    def functions(self):
        return jet_sim()

    def __call__(self, op: str, *args):
        with hoppersim.simulate(timing=self.timing, seed=self.seed):
            out = super().__call__(op, *args)
            launched = len(hoppersim.launches())
        empty = any(isinstance(t, Tensor) and t.numel() == 0 for t in args)
        assert launched or empty, f"{op} was served by the plain path"
        return out


class CudaBackend(DeviceBackend):
    """torch.ops.jet on the GPU. What an op writes in place is copied back."""

    name = "cuda"

    def __call__(self, op: str, *args):
        on_device = [_like_on(t, "cuda") if isinstance(t, Tensor) else t for t in args]
        backend = jetkernels.backend_of(op, *on_device)
        assert backend.name == "hopper", f"{op} is served by {backend}"
        out = super().__call__(op, *on_device)
        schema = getattr(torch.ops.jet, op).default._schema
        for argument, mine, theirs in zip(schema.arguments, args, on_device):
            if argument.alias_info is not None and argument.alias_info.is_write:
                mine.copy_(theirs)
        if out is None or isinstance(out, Tensor):
            return None if out is None else out.cpu()
        return tuple(t.cpu() for t in out)


def _like_on(t: Tensor, device: str) -> Tensor:
    """A copy with the same strides."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride())) if t.numel() else 0
    storage = t.as_strided((span,), (1,)).to(device)
    return storage.as_strided(t.shape, t.stride())


@cache
def has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(0) == (9, 0)


def _marks(backend: OpsBackend):
    if isinstance(backend, CudaBackend):
        return [pytest.mark.gpu, pytest.mark.skipif(not has_hopper(), reason="needs a GPU of compute capability 9.0")]
    reason = "the simulator needs nvcc (CUDA 13.0 was used) on PATH or under CUDA_HOME"
    return [pytest.mark.simulator, pytest.mark.skipif(hoppersim.nvcc() is None, reason=reason)]


def _parameters(*backends: OpsBackend):
    return [pytest.param(backend, id=backend.name, marks=_marks(backend)) for backend in backends]


EARLY, LATE, CUDA = SimulatorBackend("early", 0), SimulatorBackend("late", SEEDS[0]), CudaBackend()
each_device = pytest.mark.parametrize("backend", _parameters(EARLY, LATE, CUDA))
# where it is addresses, not timing, that matter
each_machine = pytest.mark.parametrize("backend", _parameters(EARLY, CUDA))


def simulated(test):
    """For a test that asks the simulator itself."""
    for mark in _marks(EARLY):
        test = mark(test)
    return test


def assert_every_schedule_agrees(run: Callable[[OpsBackend], tuple[Tensor, ...]]) -> None:
    """``run(backend)`` gives the same bits in both timings and in several schedules."""
    first = run(EARLY)
    for backend in (SimulatorBackend(timing, seed) for timing in ("early", "late") for seed in SEEDS):
        for out, expected in zip(run(backend), first):
            assert_bitwise(out, expected, backend.name)
