"""The residual stream's addition with the RMSNorm behind it, and their backward, in plain PyTorch."""

from ._compute import accumulation_dtype, contiguous_as, plain_op
from ._norm import normalise, normalise_backward


@plain_op
def add_rms_norm(x, residual, weight, eps):
    """jet::add_rms_norm.

    x and residual [...,C], weight [C] in their dtype or fp32 -> y and sum [...,C] in the dtype of x.
    """
    total = contiguous_as(x + residual, x.dtype)
    return contiguous_as(normalise(total, weight, eps), x.dtype), total


@plain_op
def add_rms_norm_backward(grad_y, grad_sum, x, residual, weight, eps):
    """jet::add_rms_norm_backward.

    grad_y [...,C], grad_sum [...,C] or None, then the arguments of the forward op -> gradients of x, residual and
    weight, each in its dtype.
    """
    dtype = accumulation_dtype(x)
    dx, dweight = normalise_backward(grad_y.to(dtype), (x + residual).to(dtype), weight, eps)
    if grad_sum is not None:
        dx = dx + grad_sum
    dx = contiguous_as(dx, x.dtype)
    return dx, dx.clone(), dweight
