"""``jet::dynamic_conv`` and its backward: a causal convolution whose kernels are generated per token."""

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.plain import dynamic_conv as plain


def use_silu(op: str, activation: str | None) -> bool:
    """Translate the ``activation`` argument of the Python functions into the ops' ``silu`` flag."""
    if activation in ("silu", "swish"):
        return True
    if activation is None:
        return False
    raise ValueError(f"{op}: activation must be 'silu', 'swish' or None, got {activation!r}")


def conv_state_like(x: Tensor, W: int, cu_seqlens: Tensor | None) -> Tensor:
    N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_empty((N, x.shape[2], W - 1))


def _taps(x: Tensor, weight: Tensor) -> int:
    return weight.shape[0] // max(x.shape[2], 1)


def _fake(x, hidden, weight, bias, conv_state, cu_seqlens, silu):
    return x.new_empty(x.shape), conv_state_like(x, _taps(x, weight), cu_seqlens)


def _fake_backward(grad_y, grad_conv_state_out, x, hidden, weight, bias, conv_state, cu_seqlens, silu):
    dx, dhidden, dweight = (t.new_empty(t.shape) for t in (x, hidden, weight))
    return dx, dhidden, dweight, weight.new_empty((weight.shape[0],)), conv_state_like(x, _taps(x, weight), cu_seqlens)


_register.define(
    "dynamic_conv",
    "(Tensor x, Tensor hidden, Tensor weight, Tensor? bias, Tensor? conv_state, Tensor? cu_seqlens, bool silu) "
    "-> (Tensor y, Tensor conv_state_out)",
    fake=_fake,
    plain=plain.dynamic_conv,
)
_register.define(
    "dynamic_conv_backward",
    "(Tensor grad_y, Tensor? grad_conv_state_out, Tensor x, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor? conv_state, Tensor? cu_seqlens, bool silu) "
    "-> (Tensor dx, Tensor dhidden, Tensor dweight, Tensor dbias, Tensor dconv_state)",
    fake=_fake_backward,
    plain=plain.dynamic_conv_backward,
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y, grad_conv_state_out):
    x, hidden, weight, bias, conv_state, cu_seqlens = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(x)
    dx, dhidden, dweight, dbias, dconv_state = torch.ops.jet.dynamic_conv_backward(
        grad_y, grad_conv_state_out, x, hidden, weight, bias, conv_state, cu_seqlens, ctx.silu
    )
    dbias = dbias if bias is not None else None
    dconv_state = dconv_state if conv_state is not None else None
    return dx, dhidden, dweight, dbias, dconv_state, None, None


_register.differentiate("dynamic_conv", backward=_backward, setup_context=_setup_context)
_register.autocast("dynamic_conv", low_precision=(0, 1, 2, 3, 4))


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
    """Causal depthwise convolution whose kernel is generated for every token; the kernels are never stored.

    ::

        kernel[b,t,d,w] = sum_r weight[d*W+w, r] * hidden[b,t,r] + bias[d*W+w]
        y[b,t,d] = act(sum_w kernel[b,t,d,w] * x[b, t-(W-1)+w, d])

    Args:
        x: [B, T, D], fp32, bf16 or fp16 (on a CPU also fp64); all floating arguments have one dtype.
        hidden: [B, T, R], the generator's hidden activations.
        weight: [D * W, R], row ``d * W + w`` generates tap w of channel d; W is 2, 3 or 4, tap W-1 meets the
            current token.
        bias: [D * W] or ``None``: the static kernel.
        conv_state: [N, D, W - 1], the inputs before the first token, oldest first; ``None`` means zeros.
        cu_seqlens: [N + 1] int32 or int64 offsets of N packed sequences; then B must be 1. Empty sequences are legal.
        activation: ``"silu"``, ``"swish"`` (the same) or ``None``.
        output_final_state: whether to return the last W - 1 inputs of each sequence.

    Returns:
        y [B, T, D], and conv_state [N, D, W - 1] or ``None``.

    Raises:
        RuntimeError: an argument has the wrong rank, size, dtype or device; the message names it.

    Source: JetBlock's dynamic convolution (arXiv 2508.15884, section 2.3).
    """
    y, conv_state_out = torch.ops.jet.dynamic_conv(
        x, hidden, weight, bias, conv_state, cu_seqlens, use_silu("dynamic_conv", activation)
    )
    return y, conv_state_out if output_final_state else None
