"""A residual stream's addition and the RMSNorm of the sum."""

import torch
from torch import Tensor

from reference.rms_norm import rms_norm


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """``jet::add_rms_norm``.

    Args:
        x: [..., C].
        residual: [..., C].
        weight: [C].
        eps: is added to the mean of the squares.
        dtype: what the norm is computed in, and what is returned.

    Returns:
        y and sum [..., C], in ``dtype``; sum has been rounded to the dtype of ``x``, and y is the norm of that.
    """
    total = (x.to(dtype) + residual.to(dtype)).to(x.dtype).to(dtype)
    return rms_norm(total, weight, eps, dtype), total
