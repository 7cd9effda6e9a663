"""``jet::rms_norm`` and its backward."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import Checks
from jetkernels.plain import rms_norm as plain


def _check(checks: Checks, a: Any) -> None:
    checks.rows_to_norm(a.x)
    checks.norm_weight(a.weight, a.x)


def _fake(checks: Checks, a: Any) -> Tensor:
    _check(checks, a)
    return a.x.new_empty(a.x.shape)


def _fake_backward(checks: Checks, a: Any) -> tuple[Tensor, ...]:
    _check(checks, a)
    checks.same("grad_y", a.grad_y, "x", a.x)
    return a.x.new_empty(a.x.shape), a.weight.new_empty(a.weight.shape)


_register.define("rms_norm", "(Tensor x, Tensor weight, float eps) -> (Tensor y)", fake=_fake, plain=plain.rms_norm)
_register.define_backward("rms_norm", constant=(), fake=_fake_backward, plain=plain.rms_norm_backward)
_op = torch.ops.jet.rms_norm.default


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension (arXiv 1910.07467): ``y = x / sqrt(mean x^2 + eps) * weight``.

    Computes in fp32 (fp64 of fp64) and rounds once. A row's result does not depend on the rows beside it.
    Differentiable in x and weight, once and in reverse mode; a second derivative and forward mode raise. Autocast
    changes nothing: the result has the dtype of x.

    Args:
        x: [..., C], of any strides.
        weight: [C], in the dtype of x or float32.
        eps: is added to the mean of the squares.

    Returns:
        y [..., C], contiguous, in the dtype of x.

    Raises:
        RuntimeError: an argument has a wrong shape, dtype or device.
        TypeError: an argument is no tensor, or no number.
    """
    try:
        return _op(x, weight, eps)
    except RuntimeError as error:
        raise _register.refusal(error, "rms_norm") from None
