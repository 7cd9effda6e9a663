"""``jet::apply_dynamic_conv`` and its backward: the dynamic convolution with its taps given."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import MAX_TAPS, Checks
from jetkernels.plain import apply_dynamic_conv as plain


def _check(checks: Checks, a: Any) -> None:
    checks.shape("x", a.x, "B", "T", "D")
    checks.floating("x", a.x)
    checks.shape("kernels", a.kernels, "B", "T", "D", "W")
    checks.like("kernels", a.kernels, "x", a.x)
    checks.channels("x", a.x)
    W = checks.size["W"]
    checks.taps(W, f"kernels dimension 3 (W) must be in 2..{MAX_TAPS}, got {W}")
    checks.bind("W-1", W - 1, "from kernels")
    checks.conv_sequences(a)


def _fake(checks: Checks, a: Any) -> tuple[Tensor, ...]:
    _check(checks, a)
    return a.x.new_empty(a.x.shape), checks.empty(a.x, "N", "D", "W-1")


def _fake_backward(checks: Checks, a: Any) -> tuple[Tensor, ...]:
    _check(checks, a)
    checks.conv_gradients(a)
    return a.x.new_empty(a.x.shape), a.kernels.new_empty(a.kernels.shape), checks.empty(a.x, "N", "D", "W-1")


_register.define(
    "apply_dynamic_conv",
    "(Tensor x, Tensor kernels, Tensor? conv_state, Tensor? cu_seqlens, bool silu) "
    "-> (Tensor y, Tensor conv_state_out)",
    fake=_fake,
    plain=plain.apply_dynamic_conv,
)
_register.define_backward(
    "apply_dynamic_conv", constant=("cu_seqlens",), fake=_fake_backward, plain=plain.apply_dynamic_conv_backward
)
_register.autocast("apply_dynamic_conv", low_precision=("x", "kernels", "conv_state"))
_op = torch.ops.jet.apply_dynamic_conv.default


def apply_dynamic_conv(
    x: Tensor,
    kernels: Tensor,
    conv_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = "silu",
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """:func:`dynamic_conv` with the taps given: ``y[b,t,d] = act(sum_w kernels[b,t,d,w] * x[b, t-(W-1)+w, d])``.

    Differentiable in every floating-point input, once and in reverse mode; a second derivative and forward mode raise.

    Args:
        x: [B, T, D].
        kernels: [B, T, D, W], the taps, W in 2..4; one dtype with x.
        conv_state: as in :func:`dynamic_conv`.
        cu_seqlens: as in :func:`dynamic_conv`.
        activation: as in :func:`dynamic_conv`.
        output_final_state: as in :func:`dynamic_conv`.

    Returns:
        y [B, T, D], and conv_state [N, D, W - 1] or ``None``.

    Raises:
        RuntimeError: as :func:`dynamic_conv`.
        TypeError, ValueError, NotImplementedError: as :func:`dynamic_conv`.
    """
    silu = _register.use_silu("apply_dynamic_conv", activation)
    try:
        y, conv_state_out = _op(x, kernels, conv_state, cu_seqlens, silu)
    except RuntimeError as error:
        raise _register.refusal(error, "apply_dynamic_conv") from None
    return y, conv_state_out if output_final_state else None
