"""``jet::apply_dynamic_conv`` and its backward: the dynamic convolution with explicit kernels."""

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import MAX_TAPS
from jetkernels.ops.dynamic_conv import new_conv_state, use_silu
from jetkernels.plain import apply_dynamic_conv as plain


def _check(checks, x, kernels, conv_state, cu_seqlens):
    checks.shape("x", x, "B", "T", "D")
    checks.floating("x", x)
    checks.shape("kernels", kernels, "B", "T", "D", "W")
    checks.like("kernels", kernels, "x", x)
    checks.channels("x", x)
    W = kernels.shape[3]
    checks.taps(W, f"kernels dimension 3 (W) must be in 2..{MAX_TAPS}, got {W}")
    checks.bind("W-1", W - 1, "from kernels")
    checks.conv_sequences(x, conv_state, cu_seqlens)


def _fake(checks, x, kernels, conv_state, cu_seqlens, silu):
    _check(checks, x, kernels, conv_state, cu_seqlens)
    return x.new_empty(x.shape), new_conv_state(checks, x)


def _fake_backward(checks, grad_y, grad_conv_state_out, x, kernels, conv_state, cu_seqlens, silu):
    _check(checks, x, kernels, conv_state, cu_seqlens)
    checks.conv_gradients(x, grad_y, grad_conv_state_out)
    return x.new_empty(x.shape), kernels.new_empty(kernels.shape), new_conv_state(checks, x)


_register.define(
    "apply_dynamic_conv",
    "(Tensor x, Tensor kernels, Tensor? conv_state, Tensor? cu_seqlens, bool silu) "
    "-> (Tensor y, Tensor conv_state_out)",
    fake=_fake,
    plain=plain.apply_dynamic_conv,
)
_register.define(
    "apply_dynamic_conv_backward",
    "(Tensor grad_y, Tensor? grad_conv_state_out, Tensor x, Tensor kernels, Tensor? conv_state, Tensor? cu_seqlens, "
    "bool silu) -> (Tensor dx, Tensor dkernels, Tensor dconv_state)",
    fake=_fake_backward,
    plain=plain.apply_dynamic_conv_backward,
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_conv_state_out):
    x, kernels, conv_state, cu_seqlens = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    dx, dkernels, dconv_state = torch.ops.jet.apply_dynamic_conv_backward(
        grad_y, grad_conv_state_out, x, kernels, conv_state, cu_seqlens, ctx.silu
    )
    return dx, dkernels, dconv_state if conv_state is not None else None, None, None


_register.differentiate("apply_dynamic_conv", backward=_backward, setup_context=_setup_context)
_register.autocast("apply_dynamic_conv", low_precision=(0, 1, 2))
_op = torch.ops.jet.apply_dynamic_conv.default


def apply_dynamic_conv(
    x: Tensor,
    kernels: Tensor,
    conv_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = "silu",
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """:func:`dynamic_conv` with the kernels given: ``y[b,t,d] = act(sum_w kernels[b,t,d,w] * x[b, t-(W-1)+w, d])``.

    Differentiable in every floating-point input, once and in reverse mode; a second derivative and forward mode raise.

    Args:
        x: [B, T, D].
        kernels: [B, T, D, W], W in 2..4; one dtype with x.
        conv_state, cu_seqlens, activation, output_final_state: as in :func:`dynamic_conv`.

    Returns:
        y [B, T, D], and conv_state [N, D, W - 1] or ``None``.

    Raises:
        As :func:`dynamic_conv`.
    """
    silu = use_silu("apply_dynamic_conv", activation)
    try:
        y, conv_state_out = _op(x, kernels, conv_state, cu_seqlens, silu)
    except RuntimeError as error:
        raise _register.refusal(error, "apply_dynamic_conv") from None
    return y, conv_state_out if output_final_state else None
