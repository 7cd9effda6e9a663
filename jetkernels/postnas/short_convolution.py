"""Static short convolutions, and the first values of the static taps of all convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jetkernels.modules import DynamicShortConvolution


@torch.no_grad()
def init_taps_(taps: Tensor) -> None:
    """Fills taps [D, W] as PyTorch, flash-linear-attention and Mamba2 start a depthwise convolution."""
    bound = taps.shape[1] ** -0.5
    taps.uniform_(-bound, bound)


def init_static_taps_(convolution: DynamicShortConvolution) -> None:
    """Fills the static part of a dynamic convolution's taps as `init_taps_` does."""
    init_taps_(convolution.kernel_generator.w2.bias.view(convolution.channels, convolution.kernel_size))


class ShortConvolution(nn.Module):
    """Causal depthwise convolution and SiLU: y[t, d] = silu(sum_w weight[d, w] x[t - (W-1) + w, d])."""

    def __init__(self, channels: int, size: int = 4):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, size))
        init_taps_(self.weight)

    def forward(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Convolves x [B, T, D], which follows the inputs `before` [B, W-1, D].

        Returns: y [B, T, D], and the last W-1 inputs.
        """
        W = self.weight.shape[1]
        context = torch.cat([before, x], 1)
        y = F.conv1d(context.mT, self.weight[:, None], groups=self.weight.shape[0]).mT
        return F.silu(y), context[:, context.shape[1] - (W - 1) :]
