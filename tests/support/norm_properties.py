"""What is true of a norm on every backend."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from support.backends import REFERENCE, OpsBackend, listed, reference_gradients
from support.comparison import TOLERANCE, ZERO, assert_bitwise, assert_error, rms
from torch import Tensor

# Relative error of the arithmetic, beside the one rounding of the result.
ARITHMETIC = {torch.float64: 4e-15}
ROUNDING = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-9, torch.float16: 2**-12}
HALF_OF_THE_SMALLEST = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2**-134, torch.float16: 2**-25}


def assert_rounded_once(out: Tensor, ref: Tensor, arithmetic: float = 2e-6) -> None:
    """Every element is the rounding of what fp32 (fp64) arithmetic gives for the fp64 ``ref``."""
    ceiling = ref.abs() * ARITHMETIC.get(out.dtype, arithmetic)
    # 2 ROUNDING is the distance of neighbours at the lower end of a binade, and the error there at most half of that
    ceiling += ref.abs() * 2 * ROUNDING[out.dtype] + HALF_OF_THE_SMALLEST[out.dtype] + 1e-38
    worst = ((out.double() - ref).abs() - ceiling).max().item() if out.numel() else 0.0
    assert worst <= 0, f"off by {worst:.1e} more than its rounding"


def check_norm(backend: OpsBackend, op: str, inputs: NamedTuple, arithmetic: float = 2e-6) -> None:
    """Forward against the definition."""
    outs, refs = listed(backend(op, *inputs)), listed(REFERENCE[op](*inputs))
    assert len(outs) == len(refs)
    for out in outs:
        assert out.shape == inputs.x.shape and out.dtype == inputs.x.dtype and out.is_contiguous()
    assert_rounded_once(outs[0], refs[0], arithmetic)
    if op == "add_rms_norm":
        assert_bitwise(outs[1], refs[1].to(outs[1].dtype), "sum")


def check_norm_gradients(backend: OpsBackend, op: str, inputs: NamedTuple, grads: Sequence[Tensor | None]) -> None:
    """Gradients against fp64 differentiation of the definition.

    dx is the part of u / rms(x) that is orthogonal to x, which of few columns is as good as nothing: its error is held
    against the whole. That of dgate near the zero of silu' is held against a tenth of what silu' is a factor of.
    """
    found, refs = backend.gradients(op, inputs, grads), reference_gradients(op, inputs, grads)
    assert found.keys() == refs.keys()
    z = inputs.x.double() + (inputs.residual.double() if op == "add_rms_norm" else 0)
    u = torch.zeros_like(z) if grads[0] is None else grads[0].double() * inputs.weight.double()
    if op == "gated_rms_norm":
        u = u * torch.nn.functional.silu(inputs.gate.double())
    size = (z.square().mean(-1, keepdim=True) + inputs.eps).sqrt()
    floors = {"x": rms(u / size), "residual": rms(u / size)}
    if op == "gated_rms_norm":
        floors["gate"] = 0.1 * rms(z / size * inputs.weight.double() * grads[0].double())
    for name, grad in found.items():
        assert grad.dtype == getattr(inputs, name).dtype, name
        ceiling = max(TOLERANCE[dtype].gradient for dtype in (inputs.x.dtype, grad.dtype))
        assert_error(f"d{name}", grad, refs[name], ceiling, floors.get(name, ZERO))


def rows_alone(backend: OpsBackend, op: str, inputs: NamedTuple, rows: Sequence[int]) -> None:
    """x [rows, C]: a row gives the same bits alone and among others."""
    together = listed(backend(op, *inputs))
    for row in rows:
        one = {
            name: t[row : row + 1] for name, t in inputs._asdict().items() if isinstance(t, Tensor) and name != "weight"
        }
        for alone, all_rows in zip(listed(backend(op, *inputs._replace(**one))), together):
            assert_bitwise(alone, all_rows[row : row + 1], f"row {row}")


def nan_stays(backend: OpsBackend, op: str, inputs: NamedTuple) -> None:
    """x [rows, C] with at least 3 rows."""
    clean = listed(backend(op, *inputs))
    x = inputs.x.clone()
    x[1, -1] = torch.nan
    outs = listed(backend(op, *inputs._replace(x=x)))
    assert outs[0][1].isnan().all()
    for out, expected in zip(outs, clean):
        assert_bitwise(out[[0, 2]], expected[[0, 2]], "the other rows")
