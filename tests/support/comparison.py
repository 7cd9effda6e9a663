"""How close is right: one table of tolerances, errors as RMS(out - ref) / RMS(ref) on the same rounded inputs, bits."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    output: float
    state: float
    gradient: float
    gate_gradient: float  # dg and dbeta


TOLERANCE = {
    torch.float64: Tolerance(1e-10, 1e-10, 1e-10, 1e-10),
    torch.float32: Tolerance(1e-5, 1e-5, 1e-5, 1e-5),
    torch.float16: Tolerance(1e-3, 1e-3, 2e-3, 5e-3),
    torch.bfloat16: Tolerance(5e-3, 5e-3, 8e-3, 2e-2),
}
DTYPES = tuple(TOLERANCE)
GATES = ("g", "beta")
ZERO = 1e-30  # a reference with an RMS below this is zero


def rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item() if x.numel() else 0.0


def rms_error(out: Tensor, ref: Tensor, floor: float = ZERO) -> float:
    """RMS(out - ref) / max(RMS(ref), floor), and no less than the dtype's smallest normal number below the line."""
    assert out.shape == ref.shape, f"shape {list(out.shape)}, expected {list(ref.shape)}"
    floor = max(floor, torch.finfo(out.dtype).tiny)
    return rms(out.double() - ref.double()) / max(rms(ref), floor) if out.numel() else 0.0


def assert_error(name: str, out: Tensor, ref: Tensor, ceiling: float, floor: float = ZERO) -> None:
    error = rms_error(out, ref, floor)
    assert error <= ceiling, f"{name}: RMS error {error:.2e}, ceiling {ceiling:.0e}"


def assert_outputs(outs: Sequence[Tensor], refs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """(o or y, state) within the tolerances of ``dtype``."""
    assert_error("output", outs[0], refs[0], TOLERANCE[dtype].output)
    assert_error("state", outs[1], refs[1], TOLERANCE[dtype].state)


def assert_gradients(
    grads: dict[str, Tensor], refs: dict[str, Tensor], dtype: torch.dtype, dg_floor: float = ZERO
) -> None:
    assert grads.keys() == refs.keys()
    for name, grad in grads.items():
        ceiling = TOLERANCE[dtype].gate_gradient if name in GATES else TOLERANCE[dtype].gradient
        assert_error(f"d{name}", grad, refs[name], ceiling, dg_floor if name == "g" else ZERO)


def _bytes(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def assert_bitwise(out: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal bits; so NaN equals NaN, and 0 differs from -0."""
    assert out.shape == expected.shape and out.dtype == expected.dtype, what
    same = _bytes(out) == _bytes(expected)
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} bytes differ"
