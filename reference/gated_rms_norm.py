"""The RMSNorm behind JetBlock's delta rule: with an output gate."""

import torch
from torch import Tensor

from reference.rms_norm import rms_norm


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """``jet::gated_rms_norm``: y = x / rms(x) * weight * silu(gate).

    Source: JetBlock (arXiv 2508.15884, section 2.3).

    Args:
        x: [..., V].
        gate: [..., V].
        weight: [V], one for all heads.
        eps: is added to the mean of the squares.
        dtype: what everything is computed in, and what is returned.

    Returns:
        y [..., V], in ``dtype``.
    """
    return rms_norm(x, weight, eps, dtype) * torch.nn.functional.silu(gate.to(dtype))
