"""The dynamic convolution with its taps given: y[b,t,d] = act(sum_w kernels[b,t,d,w] * x[b, t-(W-1)+w, d])."""

import torch
from torch import Tensor

from reference._sequences import per_sequence


def convolve(x: Tensor, kernels: Tensor, conv_state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence per row, before the activation: x [B,T,D], kernels [B,T,D,W], conv_state [B,D,W-1], in one dtype."""
    T, W = x.shape[1], kernels.shape[3]
    history = torch.cat([conv_state.mT, x], 1)  # [B, W-1+T, D]: token t stands in row W-1+t
    y = torch.zeros_like(x)
    for w in range(W):
        y = y + kernels[..., w] * history[:, w : w + T]  # tap w of token t meets token t-(W-1)+w
    return y, history[:, T:].mT  # the last W-1 inputs, which reach into the old state where T < W-1


def apply_dynamic_conv(
    x: Tensor,
    kernels: Tensor,
    conv_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``jet::apply_dynamic_conv``.

    Args:
        x: [B, T, D].
        kernels: [B, T, D, W], the taps; tap W-1 meets the current token.
        conv_state: [N, D, W - 1], the inputs before the first token, oldest first; ``None`` means zeros.
        cu_seqlens: [N + 1] bounds of packed sequences (B = 1) or ``None``.
        silu: whether SiLU follows.
        dtype: what everything is computed in, and what is returned.

    Returns:
        y [B, T, D] and conv_state_out [N, D, W - 1], in ``dtype``.
    """
    x, kernels = x.to(dtype), kernels.to(dtype)
    if conv_state is None:
        N = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        conv_state = x.new_zeros((N, x.shape[2], kernels.shape[3] - 1))

    def define(kernels, x, conv_state):
        return convolve(x, kernels, conv_state)

    y, conv_state_out = per_sequence(define, (kernels, x), conv_state.to(dtype), cu_seqlens)
    return torch.nn.functional.silu(y) if silu else y, conv_state_out
