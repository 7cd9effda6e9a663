"""Products with a weight, which may be stored in 8 or 4 bits: y = x W^T + bias."""

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float64) -> Tensor:
    """``jet::linear``.

    Args:
        x: [..., C].
        weight: [P, C].
        bias: [P] or ``None``.
        dtype: what everything is computed in, and what is returned.

    Returns:
        y [..., P] in ``dtype``.
    """
    y = x.to(dtype) @ weight.to(dtype).mT
    return y if bias is None else y + bias.to(dtype)


def scaled(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """[P, C]: integers [P, C] times the scale [P, G] of their group of C / G columns."""
    P, C = weight.shape
    groups = weight.to(dtype).view(P, scale.shape[1], C // scale.shape[1])
    return (groups * scale.to(dtype).unsqueeze(-1)).view(P, C)


def linear_int8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``jet::linear_int8``: ``weight`` [P, C] int8, ``scale`` [P, G]; otherwise as :func:`linear`."""
    return linear(x, scaled(weight, scale, dtype), bias, dtype)


def unpacked(weight: Tensor) -> Tensor:
    """[P, C] of -8..7 from bytes [P, C/2]: columns 2j and 2j + 1 are the low and the high half of byte j, less 8."""
    return (torch.stack([weight & 15, weight >> 4], -1).to(torch.int8) - 8).flatten(1)


def linear_int4(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``jet::linear_int4``: ``weight`` [P, C/2] uint8 (see :func:`unpacked`); otherwise as :func:`linear_int8`."""
    return linear_int8(x, unpacked(weight), scale, bias, dtype)
