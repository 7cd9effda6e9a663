"""SwiGLU, silu(gate) up.

Source: GLU variants improve Transformer (arXiv 2002.05202).
"""

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """``jet::swiglu``.

    Args:
        gate: [..., C].
        up: [..., C].
        dtype: what everything is computed in, and what is returned.
    """
    return torch.nn.functional.silu(gate.to(dtype)) * up.to(dtype)
