"""``jet::swiglu`` and its backward."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import Checks
from jetkernels.plain import swiglu as plain


def _check(checks: Checks, a: Any) -> None:
    checks.rows("gate", a.gate)
    checks.floating("gate", a.gate)
    checks.same("up", a.up, "gate", a.gate)


def _fake(checks: Checks, a: Any) -> Tensor:
    _check(checks, a)
    return a.gate.new_empty(a.gate.shape)


def _fake_backward(checks: Checks, a: Any) -> tuple[Tensor, ...]:
    _check(checks, a)
    checks.same("grad_y", a.grad_y, "gate", a.gate)
    return a.gate.new_empty(a.gate.shape), a.up.new_empty(a.up.shape)


_register.define("swiglu", "(Tensor gate, Tensor up) -> (Tensor y)", fake=_fake, plain=plain.swiglu)
_register.define_backward("swiglu", constant=(), fake=_fake_backward, plain=plain.swiglu_backward)
_op = torch.ops.jet.swiglu.default


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, computed in fp32 (fp64 for float64) and rounded once: the activation of a gated MLP.

    Differentiable once and in reverse mode; a second derivative and forward mode raise. Autocast leaves it alone, as
    it leaves SiLU and products.

    Args:
        gate: [..., C], 1 to 8 dimensions, of any strides.
        up: of the same shape, dtype and device.

    Returns:
        y [..., C] in the same dtype, contiguous.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.
        TypeError: an argument is not a tensor.

    Source: GLU variants improve Transformer (arXiv 2002.05202).
    """
    try:
        return _op(gate, up)
    except RuntimeError as error:
        raise _register.refusal(error, "swiglu") from None
