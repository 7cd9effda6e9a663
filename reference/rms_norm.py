"""RMSNorm over the last dimension: y = x / sqrt(mean x^2 + eps) * weight."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """``jet::rms_norm``.

    Source: RMSNorm (arXiv 1910.07467).

    Args:
        x: [..., C].
        weight: [C].
        eps: is added to the mean of the squares.
        dtype: what everything is computed in, and what is returned.

    Returns:
        y [..., C], in ``dtype``.
    """
    x = x.to(dtype)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(dtype)
