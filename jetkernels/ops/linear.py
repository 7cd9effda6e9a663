"""``jet::linear``: a product with a weight that is streamed from memory once, for few rows."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from jetkernels import _library
from jetkernels.ops import _register
from jetkernels.ops._checks import Checks
from jetkernels.ops._linear import check_bias, check_rows, outputs
from jetkernels.plain import linear as plain

# Up to so many rows the op is faster than torch.nn.functional.linear, or as fast (docs/linear.md has the times).
MOST_ROWS = {
    torch.bfloat16: 128 if _library.build_info()["cpu_amx"] else 8,
    torch.float16: 8,
    torch.float32: 16,
    torch.float64: 4,
}


def _fake(checks: Checks, a: Any) -> Tensor:
    check_rows(checks, a.x)
    checks.shape("weight", a.weight, "P", "C")
    checks.like("weight", a.weight, "x", a.x)
    check_bias(checks, a)
    return outputs(checks, a)


_register.define("linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", fake=_fake, plain=plain.linear)
_register.not_differentiable("linear", instead="torch.nn.functional.linear")
_register.autocast("linear", low_precision=("x", "weight", "bias"))
_op = torch.ops.jet.linear.default


def _is_served(x: Any, weight: Any, bias: Any) -> bool:
    """Whether the op takes this call: it would be faster, and no gradient is wanted."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return True  # the op has a sentence about it
    if x.device.type != "cpu" or x.dim() > 8 or forward_ad._current_level >= 0 or torch.compiler.is_exporting():
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias) if isinstance(t, Tensor)):
        return False
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows <= MOST_ROWS.get(x.dtype, 0)


def _refuse(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises what the op says of wrong arguments, without computing anything."""
    tensors = [t.to("meta") if isinstance(t, Tensor) else t for t in (x, weight, bias)]
    try:
        with torch.no_grad():
            _op(*tensors)
    except RuntimeError as error:
        raise _register.refusal(error, "linear") from None
    checks = Checks("linear")
    for name, t in (("weight", weight), ("bias", bias)):
        if isinstance(t, Tensor):  # on meta all have one device
            checks.device(name, t, "x", x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = x W^T + bias``, as fast as memory gives the weight where there are few rows on a CPU.

    The call goes to ``torch.ops.jet.linear`` for up to ``MOST_ROWS`` rows on a CPU, and to
    ``torch.nn.functional.linear`` for more rows, on other devices, where an input requires a gradient, in forward mode
    and in ``torch.export``. A row of the op's y depends on that row of x alone, and not on the number of threads.

    Args:
        x: [..., C], float32, bfloat16, float16 or float64.
        weight: [P, C] in the dtype of x.
        bias: [P] in the dtype of x, or ``None``.

    Returns:
        y [..., P] in the dtype of x.

    Raises:
        RuntimeError: an argument is wrong; the message names it.
        TypeError: an argument is not of the type above.
    """
    if not _is_served(x, weight, bias):
        try:
            # torch takes some of these
            if weight.dim() != 2 or weight.device != x.device or (bias is not None and bias.shape != weight.shape[:1]):
                _refuse(x, weight, bias)
            return torch.nn.functional.linear(x, weight, bias)
        except (RuntimeError, TypeError, IndexError, AttributeError):
            # Of what the op refuses too, it names the argument.
            _refuse(x, weight, bias)
            raise
    try:
        return _op(x, weight, bias)
    except RuntimeError as error:
        raise _register.refusal(error, "linear") from None
