"""The root mean square of rows, and the gradient of what is divided by it."""

from ._compute import accumulation_dtype


def inverse_rms(x, eps):
    """1 / sqrt(mean x^2 + eps) over the last dimension, [..., 1]."""
    return (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def normalise(x, weight, eps):
    """Gives x / rms(x) * weight in the dtype of the arithmetic."""
    x = x.to(accumulation_dtype(x))
    return x * inverse_rms(x, eps) * weight.to(x.dtype)


def normalise_backward(grad, x, weight, eps):
    """Gradients of x [..., C], in the dtype of the arithmetic, and of weight [C], from that of `normalise`."""
    inverse = inverse_rms(x, eps)
    normed = x * inverse
    u = grad * weight.to(x.dtype)
    dx = inverse * (u - normed * (u * normed).mean(-1, keepdim=True))
    return dx, (grad * normed)[None].flatten(0, -2).sum(0).to(weight.dtype)
