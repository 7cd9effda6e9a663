"""RMSNorm and its backward, in plain PyTorch."""

from ._compute import accumulation_dtype, contiguous_as, plain_op
from ._norm import normalise, normalise_backward


@plain_op
def rms_norm(x, weight, eps):
    """jet::rms_norm.

    x [...,C], weight [C] in the dtype of x or fp32 -> y [...,C] in the dtype of x.
    """
    return contiguous_as(normalise(x, weight, eps), x.dtype)


@plain_op
def rms_norm_backward(grad_y, x, weight, eps):
    """jet::rms_norm_backward.

    grad_y [...,C], then the arguments of the forward op -> gradients of x and weight, each in its dtype.
    """
    dtype = accumulation_dtype(x)
    dx, dweight = normalise_backward(grad_y.to(dtype), x.to(dtype), weight, eps)
    return contiguous_as(dx, x.dtype), dweight
