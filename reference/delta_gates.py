"""The gates of the gated delta rule: logarithm of the decay, and write strength.

Source: Gated Delta Networks (arXiv 2412.06464, section 3); used by JetBlock (arXiv 2508.15884, section 2.3).
"""

import torch
from torch import Tensor


def delta_gates(
    a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """``jet::delta_gates``.

    Args:
        a: [..., H].
        b: [..., H].
        A_log: [H].
        dt_bias: [H].
        dtype: what everything is computed in, and what is returned.

    Returns:
        g = -exp(A_log) softplus(a + dt_bias) and beta = sigmoid(b), [..., H] in ``dtype``.
    """
    a, b, A_log, dt_bias = (t.to(dtype) for t in (a, b, A_log, dt_bias))
    x = a + dt_bias
    return -A_log.exp() * torch.logaddexp(x, torch.zeros_like(x)), torch.sigmoid(b)
