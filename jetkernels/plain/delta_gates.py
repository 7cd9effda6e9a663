"""The gates of the gated delta rule and their backward in plain PyTorch."""

import torch

from ._compute import accumulation_dtype, contiguous_as, plain_op


def softplus(x):
    """log(1 + e^x) without a threshold: no exponent is positive."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def wide_inputs(a, A_log, dt_bias):
    """exp(A_log) [H] and a + dt_bias [.., H], in the dtype of the arithmetic."""
    dtype = accumulation_dtype(a)
    return A_log.to(dtype).exp(), a.to(dtype) + dt_bias.to(dtype)


@plain_op
def delta_gates(a, b, A_log, dt_bias):
    """jet::delta_gates: a, b [.., H], A_log, dt_bias [H] -> g, beta [.., H] in fp32 (fp64 if a is)."""
    rate, x = wide_inputs(a, A_log, dt_bias)
    g, beta = -rate * softplus(x), torch.sigmoid(b.to(x.dtype))
    return contiguous_as(g, x.dtype), contiguous_as(beta, x.dtype)


@plain_op
def delta_gates_backward(grad_g, grad_beta, a, b, A_log, dt_bias):
    """jet::delta_gates_backward.

    grad_g, grad_beta [.., H] in fp32 (fp64 if a is), the latter None or given, then the arguments of the forward op
    -> gradients of a, b [.., H], A_log, dt_bias [H], each in the dtype of its argument.
    """
    rate, x = wide_inputs(a, A_log, dt_bias)
    tokens = tuple(range(x.dim() - 1))
    scaled = -grad_g * rate
    dx = scaled * torch.sigmoid(x)
    dA_log = (scaled * softplus(x)).flatten(0, -2).sum(0) if tokens else scaled * softplus(x)
    ddt_bias = dx.flatten(0, -2).sum(0) if tokens else dx
    if grad_beta is None:
        db = torch.zeros_like(x)
    else:
        b = b.to(x.dtype)
        db = grad_beta * torch.sigmoid(b) * torch.sigmoid(-b)  # 1 - sigmoid(b) would cancel
    return (
        contiguous_as(dx, a.dtype),
        contiguous_as(db, a.dtype),
        contiguous_as(dA_log, A_log.dtype),
        contiguous_as(ddt_bias, dt_bias.dtype),
    )
