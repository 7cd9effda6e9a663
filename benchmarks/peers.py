"""What our ops are measured against on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def transformers_delta_rule():
    """The torch functions of transformers' Qwen3-Next: (chunk, recurrent). Their q, k, v are [B, T, H, K or V]."""
    from transformers.models.qwen3_next import modeling_qwen3_next as peer

    return peer.torch_chunk_gated_delta_rule, peer.torch_recurrent_gated_delta_rule


def generator_gemm(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The bare GEMM that generates the kernels [B, T, D*W]: what the convolution cannot be rid of."""
    return F.linear(hidden, weight, bias)


def unfused_dynamic_conv(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution with materialised kernels, as the official code computes it: linear, unfold, sum, SiLU."""
    B, T, D = x.shape
    W = weight.shape[0] // D
    kernels = F.linear(hidden, weight, bias).view(B, T, D, W)
    windows = F.pad(x.transpose(1, 2), (W - 1, 0)).unfold(-1, W, 1)  # [B, D, T, W]
    return F.silu((windows.transpose(1, 2) * kernels).sum(-1))
