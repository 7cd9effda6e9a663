"""``jet::delta_gates`` and its backward: decay and write strength of the gated delta rule."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import Checks, real_dtype
from jetkernels.plain import delta_gates as plain


def _check(checks: Checks, a: Any) -> None:
    checks.rows("a", a.a)
    checks.floating("a", a.a)
    checks.same("b", a.b, "a", a.a)
    checks.bind("H", a.a.shape[-1], "as in a")
    for name, parameter in (("A_log", a.A_log), ("dt_bias", a.dt_bias)):
        checks.shape(name, parameter, "H")
        checks.dtype_like_or_fp32(name, parameter, "a", a.a)
        checks.device(name, parameter, "a", a.a)


def _fake(checks: Checks, a: Any) -> tuple[Tensor, ...]:
    _check(checks, a)
    return tuple(a.a.new_empty(a.a.shape, dtype=real_dtype(a.a)) for _ in range(2))


def _fake_backward(checks: Checks, a: Any) -> tuple[Tensor, ...]:
    _check(checks, a)
    for name, grad in (("grad_g", a.grad_g), ("grad_beta", a.grad_beta)):
        if name == "grad_beta" and grad is None:
            continue
        checks.shape_like(name, grad, "a", a.a)
        checks.dtype(name, grad, real_dtype(a.a))
        checks.device(name, grad, "a", a.a)
    return tuple(t.new_empty(t.shape) for t in (a.a, a.b, a.A_log, a.dt_bias))


_register.define(
    "delta_gates",
    "(Tensor a, Tensor b, Tensor A_log, Tensor dt_bias) -> (Tensor g, Tensor beta)",
    fake=_fake,
    plain=plain.delta_gates,
)
_register.define_backward("delta_gates", constant=(), fake=_fake_backward, plain=plain.delta_gates_backward)
_op = torch.ops.jet.delta_gates.default


def delta_gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """``g = -exp(A_log) * softplus(a + dt_bias)`` and ``beta = sigmoid(b)``, the gates of the delta-rule ops.

    Computed in fp32 (fp64 for float64); softplus has no threshold and does not overflow. Differentiable once and in
    reverse mode; a second derivative and forward mode raise. The sums over tokens of the gradients of A_log and
    dt_bias are the same in every run. Autocast leaves the arguments alone.

    Args:
        a: [..., H], 1 to 8 dimensions, of any strides.
        b: of the same shape, dtype and device.
        A_log: [H], float32 or the dtype of a: the logarithm of the decay rate.
        dt_bias: [H], float32 or the dtype of a.

    Returns:
        g and beta [..., H], contiguous, float32 (float64 if a is).

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.
        TypeError: an argument is not a tensor.

    Source: Gated Delta Networks (arXiv 2412.06464, section 3).
    """
    try:
        return _op(a, b, A_log, dt_bias)
    except RuntimeError as error:
        raise _register.refusal(error, "delta_gates") from None
