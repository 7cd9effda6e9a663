"""RMSNorm with an output gate, and its backward, in plain PyTorch."""

import torch

from ._compute import accumulation_dtype, contiguous_as, plain_op
from ._norm import normalise, normalise_backward


@plain_op
def gated_rms_norm(x, gate, weight, eps):
    """jet::gated_rms_norm.

    x and gate [...,V], weight [V] in their dtype or fp32 -> y [...,V] in the dtype of x.
    """
    y = normalise(x, weight, eps)
    return contiguous_as(y * torch.nn.functional.silu(gate.to(y.dtype)), x.dtype)


@plain_op
def gated_rms_norm_backward(grad_y, x, gate, weight, eps):
    """jet::gated_rms_norm_backward.

    grad_y [...,V], then the arguments of the forward op -> gradients of x, gate and weight, each in its dtype.
    """
    dtype = accumulation_dtype(x)
    grad_y, wide, gate = grad_y.to(dtype), x.to(dtype), gate.to(dtype)
    sigmoid = gate.sigmoid()
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    dgate = grad_y * normalise(x, weight, eps) * slope
    dx, dweight = normalise_backward(grad_y * (gate * sigmoid), wide, weight, eps)
    return contiguous_as(dx, x.dtype), contiguous_as(dgate, x.dtype), dweight
