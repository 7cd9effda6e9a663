"""``jet::dynamic_conv`` and its backward: a causal convolution whose kernels are generated per token."""

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import Checks
from jetkernels.plain import dynamic_conv as plain


def use_silu(function: str, activation: str | None) -> bool:
    """Translate the ``activation`` argument of the Python functions into the ops' ``silu`` flag."""
    if activation is None:
        return False
    if isinstance(activation, str) and activation in ("silu", "swish"):
        return True
    raise ValueError(f"{function}: activation must be 'silu', 'swish' or None, got {activation!r}")


def new_conv_state(checks: Checks, x: Tensor) -> Tensor:
    return x.new_empty([checks.size[symbol] for symbol in ("N", "D", "W-1")])


def _check(checks, x, hidden, weight, bias, conv_state, cu_seqlens):
    checks.shape("x", x, "B", "T", "D")
    checks.floating("x", x)
    checks.shape("hidden", hidden, "B", "T", "R")
    checks.generator(x, hidden, weight, bias)
    checks.conv_sequences(x, conv_state, cu_seqlens)


def _fake(checks, x, hidden, weight, bias, conv_state, cu_seqlens, silu):
    _check(checks, x, hidden, weight, bias, conv_state, cu_seqlens)
    return x.new_empty(x.shape), new_conv_state(checks, x)


def _fake_backward(checks, grad_y, grad_conv_state_out, x, hidden, weight, bias, conv_state, cu_seqlens, silu):
    _check(checks, x, hidden, weight, bias, conv_state, cu_seqlens)
    checks.conv_gradients(x, grad_y, grad_conv_state_out)
    dx, dhidden, dweight = (t.new_empty(t.shape) for t in (x, hidden, weight))
    return dx, dhidden, dweight, weight.new_empty((weight.shape[0],)), new_conv_state(checks, x)


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
    """Causal depthwise convolution whose kernel is generated for every token; the kernels are never stored.

    Differentiable in every floating-point input, once and in reverse mode; a second derivative and forward mode raise.

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
        TypeError, ValueError: an argument is not a tensor, or not an activation, as above.
        RuntimeError, NotImplementedError: a second derivative is asked for; an input has a tangent (forward mode).

    Source: JetBlock's dynamic convolution (arXiv 2508.15884, section 2.3).
    """
    silu = use_silu("dynamic_conv", activation)
    try:
        y, conv_state_out = _op(x, hidden, weight, bias, conv_state, cu_seqlens, silu)
    except RuntimeError as error:
        raise _register.refusal(error, "dynamic_conv") from None
    return y, conv_state_out if output_final_state else None
