"""``jet::apply_dynamic_conv`` and its backward: the dynamic convolution with explicit kernels."""

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops.dynamic_conv import conv_state_like, use_silu
from jetkernels.plain import apply_dynamic_conv as plain


def _fake(x, kernels, conv_state, cu_seqlens, silu):
    return x.new_empty(x.shape), conv_state_like(x, kernels.shape[3], cu_seqlens)


def _fake_backward(grad_y, grad_conv_state_out, x, kernels, conv_state, cu_seqlens, silu):
    dconv_state = conv_state_like(x, kernels.shape[3], cu_seqlens)
    return x.new_empty(x.shape), kernels.new_empty(kernels.shape), dconv_state


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


def apply_dynamic_conv(
    x: Tensor,
    kernels: Tensor,
    conv_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activation: str | None = "silu",
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """:func:`dynamic_conv` with the kernels given: ``y[b,t,d] = act(sum_w kernels[b,t,d,w] * x[b, t-(W-1)+w, d])``.

    Args:
        x: [B, T, D].
        kernels: [B, T, D, W], W in 2..4; one dtype with x.
        conv_state, cu_seqlens, activation, output_final_state: as in :func:`dynamic_conv`.

    Returns:
        y [B, T, D], and conv_state [N, D, W - 1] or ``None``.

    Raises:
        RuntimeError: an argument has the wrong rank, size, dtype or device; the message names it.
    """
    y, conv_state_out = torch.ops.jet.apply_dynamic_conv(
        x, kernels, conv_state, cu_seqlens, use_silu("apply_dynamic_conv", activation)
    )
    return y, conv_state_out if output_final_state else None
