"""``jet::dynamic_conv`` and its backward: a causal convolution whose taps are generated per token."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import Checks
from jetkernels.plain import dynamic_conv as plain


def _check(checks: Checks, a: Any) -> None:
    checks.shape("x", a.x, "B", "T", "D")
    checks.floating("x", a.x)
    checks.shape("hidden", a.hidden, "B", "T", "R")
    checks.generator(a)
    checks.conv_sequences(a)


def _fake(checks: Checks, a: Any) -> tuple[Tensor, ...]:
    _check(checks, a)
    return a.x.new_empty(a.x.shape), checks.empty(a.x, "N", "D", "W-1")


def _fake_backward(checks: Checks, a: Any) -> tuple[Tensor, ...]:
    _check(checks, a)
    checks.conv_gradients(a)
    dx, dhidden, dweight = (t.new_empty(t.shape) for t in (a.x, a.hidden, a.weight))
    return dx, dhidden, dweight, checks.empty(a.x, "D*W"), checks.empty(a.x, "N", "D", "W-1")


_register.define(
    "dynamic_conv",
    "(Tensor x, Tensor hidden, Tensor weight, Tensor? bias, Tensor? conv_state, Tensor? cu_seqlens, bool silu) "
    "-> (Tensor y, Tensor conv_state_out)",
    fake=_fake,
    plain=plain.dynamic_conv,
)
_register.define_backward(
    "dynamic_conv", constant=("cu_seqlens",), fake=_fake_backward, plain=plain.dynamic_conv_backward
)
_register.autocast("dynamic_conv", low_precision=("x", "hidden", "weight", "bias", "conv_state"))
_op = torch.ops.jet.dynamic_conv.default


def dynamic_conv(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    conv_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = "silu",
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal depthwise convolution whose taps are generated for every token; no tensor of taps [B, T, D, W] is made.

    Differentiable in every floating-point input, once and in reverse mode; a second derivative and forward mode raise.

    ::

        taps[b,t,d,w] = sum_r weight[d*W+w, r] * hidden[b,t,r] + bias[d*W+w]
        y[b,t,d] = act(sum_w taps[b,t,d,w] * x[b, t-(W-1)+w, d])

    Args:
        x: [B, T, D], fp32, bf16, fp16 or fp64; all floating arguments have one dtype.
        hidden: [B, T, R], the generator's hidden activations.
        weight: [D * W, R], row ``d * W + w`` generates tap w of channel d; W is 2, 3 or 4, tap W-1 meets the
            current token.
        bias: [D * W], the part of the taps that no token changes, or ``None``.
        conv_state: [N, D, W - 1], the inputs before the first token, oldest first; ``None`` means zeros.
        cu_seqlens: [N + 1] int32 or int64 offsets of N packed sequences; then B must be 1. Empty sequences are legal.
        activation: ``"silu"``, ``"swish"`` (the same) or ``None``.
        output_final_state: whether to return the last W - 1 inputs of each sequence.

    Returns:
        y [B, T, D], and conv_state [N, D, W - 1] or ``None``.

    Raises:
        RuntimeError: an argument has the wrong rank, size, dtype or device; the message names it.
        TypeError, ValueError: an argument is not a tensor, or not an activation, as above.
        RuntimeError, NotImplementedError: a second derivative is asked for; an input has a tangent (forward mode).

    Source: JetBlock's dynamic convolution (arXiv 2508.15884, section 2.3).
    """
    silu = _register.use_silu("dynamic_conv", activation)
    try:
        y, conv_state_out = _op(x, hidden, weight, bias, conv_state, cu_seqlens, silu)
    except RuntimeError as error:
        raise _register.refusal(error, "dynamic_conv") from None
    return y, conv_state_out if output_final_state else None
