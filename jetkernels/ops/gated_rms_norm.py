"""``jet::gated_rms_norm`` and its backward: the norm behind JetBlock's delta rule."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import Checks
from jetkernels.plain import gated_rms_norm as plain


def _check(checks: Checks, a: Any) -> None:
    checks.rows_to_norm(a.x)
    checks.same("gate", a.gate, "x", a.x)
    checks.norm_weight(a.weight, a.x)


def _fake(checks: Checks, a: Any) -> Tensor:
    _check(checks, a)
    return a.x.new_empty(a.x.shape)


def _fake_backward(checks: Checks, a: Any) -> tuple[Tensor, ...]:
    _check(checks, a)
    checks.same("grad_y", a.grad_y, "x", a.x)
    return a.x.new_empty(a.x.shape), a.x.new_empty(a.x.shape), a.weight.new_empty(a.weight.shape)


_register.define(
    "gated_rms_norm",
    "(Tensor x, Tensor gate, Tensor weight, float eps) -> (Tensor y)",
    fake=_fake,
    plain=plain.gated_rms_norm,
)
_register.define_backward("gated_rms_norm", constant=(), fake=_fake_backward, plain=plain.gated_rms_norm_backward)
_register.autocast("gated_rms_norm", widest=("x", "gate"))
_op = torch.ops.jet.gated_rms_norm.default


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """:func:`rms_norm` with an output gate: ``y = x / sqrt(mean x^2 + eps) * weight * silu(gate)``.

    Differentiable as :func:`rms_norm`. Under autocast x and gate are cast to the wider of their dtypes.

    Args:
        x: [..., V], of any strides.
        gate: [..., V], in the dtype of x, of any strides.
        weight: [V], one for all heads, in the dtype of x or float32.
        eps: is added to the mean of the squares.

    Returns:
        y [..., V], contiguous, in the dtype of x.

    Raises:
        RuntimeError, TypeError: as :func:`rms_norm`.
    """
    try:
        return _op(x, gate, weight, eps)
    except RuntimeError as error:
        raise _register.refusal(error, "gated_rms_norm") from None
