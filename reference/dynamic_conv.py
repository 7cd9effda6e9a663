"""The dynamic convolution: every token generates the taps that are applied at it.

Source: JetBlock (arXiv 2508.15884, section 2.3).
"""

import torch
from torch import Tensor

from reference.apply_dynamic_conv import apply_dynamic_conv


def generate_taps(hidden: Tensor, weight: Tensor, bias: Tensor | None, D: int) -> Tensor:
    """The taps [..., D, W] of hidden [..., R].

    tap[..., d, w] = sum_r weight[d*W+w, r] * hidden[..., r] + bias[d*W+w].
    """
    taps = hidden @ weight.mT
    if bias is not None:
        taps = taps + bias
    return taps.unflatten(-1, (D, weight.shape[0] // D))


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
        x: [B, T, D].
        hidden: [B, T, R].
        weight: [D * W, R].
        bias: [D * W] or ``None``.
        conv_state: [N, D, W - 1], the inputs before the first token, oldest first; ``None`` means zeros.
        cu_seqlens: [N + 1] bounds of packed sequences (B = 1) or ``None``.
        silu: whether SiLU follows.
        dtype: what everything is computed in, and what is returned.

    Returns:
        y [B, T, D] and conv_state_out [N, D, W - 1], in ``dtype``.
    """
    bias = None if bias is None else bias.to(dtype)
    taps = generate_taps(hidden.to(dtype), weight.to(dtype), bias, x.shape[2])
    return apply_dynamic_conv(x, taps, conv_state, cu_seqlens, silu, dtype)
