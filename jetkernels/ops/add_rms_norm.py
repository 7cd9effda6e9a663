"""``jet::add_rms_norm`` and its backward: the residual stream's addition with the norm behind it."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import Checks
from jetkernels.plain import add_rms_norm as plain


def _check(checks: Checks, a: Any) -> None:
    checks.rows_to_norm(a.x)
    checks.same("residual", a.residual, "x", a.x)
    checks.norm_weight(a.weight, a.x)


def _fake(checks: Checks, a: Any) -> tuple[Tensor, ...]:
    _check(checks, a)
    return a.x.new_empty(a.x.shape), a.x.new_empty(a.x.shape)


def _fake_backward(checks: Checks, a: Any) -> tuple[Tensor, ...]:
    _check(checks, a)
    checks.same("grad_y", a.grad_y, "x", a.x)
    if a.grad_sum is not None:
        checks.same("grad_sum", a.grad_sum, "x", a.x)
    return a.x.new_empty(a.x.shape), a.x.new_empty(a.x.shape), a.weight.new_empty(a.weight.shape)


_register.define(
    "add_rms_norm",
    "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor sum)",
    fake=_fake,
    plain=plain.add_rms_norm,
)
_register.define_backward("add_rms_norm", constant=(), fake=_fake_backward, plain=plain.add_rms_norm_backward)
_register.autocast("add_rms_norm", widest=("x", "residual"))
_op = torch.ops.jet.add_rms_norm.default


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """``sum = x + residual``, rounded to the dtype, and :func:`rms_norm` of that sum.

    One pass over memory for what a layer of a transformer does between its parts. Differentiable as :func:`rms_norm`.
    Under autocast x and residual are cast to the wider of their dtypes.

    Args:
        x: [..., C], of any strides.
        residual: [..., C], in the dtype of x, of any strides.
        weight: [C], in the dtype of x or float32.
        eps: is added to the mean of the squares.

    Returns:
        y and sum [..., C], contiguous, in the dtype of x.

    Raises:
        RuntimeError, TypeError: as :func:`rms_norm`.
    """
    try:
        return _op(x, residual, weight, eps)
    except RuntimeError as error:
        raise _register.refusal(error, "add_rms_norm") from None
