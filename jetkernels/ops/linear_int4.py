"""``jet::linear_int4``: a product with a weight of 4 bits."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import Checks
from jetkernels.ops._linear import check_bias, check_rows, check_scale, outputs
from jetkernels.plain import linear as plain


def _fake(checks: Checks, a: Any) -> Tensor:
    check_rows(checks, a.x)
    C = checks.size["C"]
    checks.require(C % 2 == 0, f"x dimension {a.x.dim() - 1} (C) must be even, got {C}")
    checks.bind("C/2", C // 2, "from x")
    checks.shape("weight", a.weight, "P", "C/2")
    checks.dtype("weight", a.weight, torch.uint8)
    checks.device("weight", a.weight, "x", a.x)
    check_scale(checks, a, 2)
    check_bias(checks, a)
    return outputs(checks, a)


_register.define(
    "linear_int4",
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
    fake=_fake,
    plain=plain.linear_int4,
)
_register.not_differentiable("linear_int4", instead="torch.nn.functional.linear with a weight in the dtype of x")
_register.autocast("linear_int4", low_precision=("x", "bias"), fp32=("scale",))
_op = torch.ops.jet.linear_int4.default


def linear_int4(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x W^T + bias`` with ``W[p, c] = scale[p, g] * (half[p, c] - 8)``, g = c // (C / G) the group of the column.

    For inference, under ``torch.no_grad()``: not differentiable. Sums are fp32 (fp64 for float64), the scale multiplies
    the sum of its group, and the result is rounded once. On a CPU the weight is read from memory once; elsewhere it
    is widened by operations of PyTorch.

    Args:
        x: [..., C], float32, bfloat16, float16 or float64.
        weight: [P, C/2] uint8: byte j holds column 2j in its low and 2j + 1 in its high half, plus 8.
        scale: [P, G] float32; G divides C into groups, each of an even number of columns.
        bias: [P] in the dtype of x, or ``None``.

    Returns:
        y [..., P] in the dtype of x.

    Raises:
        RuntimeError: an argument is wrong; the message names it. With gradients on, an input that requires one.
        TypeError: an argument is not of the type above.
        NotImplementedError: an input has a tangent (forward mode).
    """
    try:
        return _op(x, weight, scale, bias)
    except RuntimeError as error:
        raise _register.refusal(error, "linear_int4") from None
