"""How the peers want the same problem: exact changes of layout, tested on a CPU against our own op.

The delta rule acts on each value column alone, so a head of V columns is V / 128 heads of 128 with the same q, k, g
and beta. A key dimension that is zero in q and k never changes the output, so K = 96 may be padded to 128, after the
l2norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD = 128  # the only head size of FlashQLA and FlashInfer
L2NORM_EPS = 1e-6

Inputs = dict[str, Tensor]  # q, k, v, g, beta


def normalized(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension, in fp32, in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2NORM_EPS)).to(x.dtype)


def padded_keys(x: Tensor) -> Tensor:
    """[..., K] -> [..., 128] with zeros."""
    return F.pad(x, (0, HEAD - x.shape[-1]))


def split_values(v: Tensor) -> Tensor:
    """[B, T, H, V] -> [B, T, H V/128, 128]: a view."""
    return v.unflatten(-1, (-1, HEAD)).flatten(2, 3)


def merged_values(o: Tensor, H: int) -> Tensor:
    """[B, T, H V/128, 128] -> [B, T, H, V]."""
    return o.unflatten(2, (H, -1)).flatten(3, 4)


def merged_states(S: Tensor, H: int) -> Tensor:
    """[N, H V/128, K, 128] -> [N, H, K, V]."""
    return S.unflatten(1, (H, -1)).transpose(2, 3).flatten(3, 4)


def heads_of_128(inputs: Inputs) -> Inputs:
    """The same problem with K = V = 128: q and k are normalised, and the scale stays that of the original K."""
    parts = inputs["v"].shape[-1] // HEAD
    return {
        "q": padded_keys(normalized(inputs["q"])).contiguous(),
        "k": padded_keys(normalized(inputs["k"])).contiguous(),
        "v": split_values(inputs["v"]).contiguous(),
        "g": inputs["g"].repeat_interleave(parts, 2).contiguous(),
        "beta": inputs["beta"].repeat_interleave(parts, 2).contiguous(),
    }


def rounded_gates(inputs: Inputs) -> tuple[Inputs, Tensor, Tensor]:
    """Gates that a peer can take raw, in bf16: (inputs with g = -softplus(a), beta = sigmoid(b), a, b)."""
    a = torch.log(torch.expm1(-inputs["g"].double())).to(torch.bfloat16)
    b = torch.logit(inputs["beta"].double(), eps=1e-6).to(torch.bfloat16)
    return {**inputs, "g": -F.softplus(a.float()), "beta": b.float().sigmoid()}, a, b
