"""The dynamic convolution: every token generates the kernel that is applied to it.

Source: JetBlock (arXiv 2508.15884, section 2.3).
"""

import torch
from torch import Tensor

from reference.apply_dynamic_conv import apply_dynamic_conv


def generate_kernels(hidden: Tensor, weight: Tensor, bias: Tensor | None, D: int) -> Tensor:
    """kernel[..., d, w] = sum_r weight[d*W+w, r] * hidden[..., r] + bias[d*W+w]; hidden [..., R] -> [..., D, W]."""
    kernels = hidden @ weight.mT
    if bias is not None:
        kernels = kernels + bias
    return kernels.unflatten(-1, (D, weight.shape[0] // D))


def dynamic_conv(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``jet::dynamic_conv``.

    Args:
        x: [B, T, D].  hidden: [B, T, R].  weight: [D * W, R].  bias: [D * W] or ``None``.
        conv_state, cu_seqlens: as in :func:`reference.apply_dynamic_conv.apply_dynamic_conv`.

    Returns:
        y [B, T, D] and conv_state_out [N, D, W - 1], in ``dtype``.
    """
    bias = None if bias is None else bias.to(dtype)
    kernels = generate_kernels(hidden.to(dtype), weight.to(dtype), bias, x.shape[2])
    return apply_dynamic_conv(x, kernels, conv_state, cu_seqlens, silu, dtype)
