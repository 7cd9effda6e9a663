"""Products with a weight, which may be stored in 8 or 4 bits, in plain PyTorch."""

import torch

from ._compute import accumulation_dtype, plain_op

_NUMBERS = 1 << 24  # of the weight that are widened at a time


@plain_op
def linear(x, weight, bias):
    """jet::linear: x [...,C], weight [P,C], bias [P] or None, all in one dtype -> y [...,P] in that dtype."""
    return torch.nn.functional.linear(x, weight, bias)


def _linear_of(x, weight, scale, bias, widen):
    """Makes y [...,P] from rows of `weight`, of which `widen` makes numbers [p,C]."""
    dtype, (P, G) = accumulation_dtype(x), scale.shape
    wide, C = x.to(dtype), x.shape[-1]
    y = torch.empty((*x.shape[:-1], P), dtype=x.dtype, device=x.device)
    rows = max(1, _NUMBERS // max(C, 1))
    for p in range(0, P, rows):
        some = slice(p, p + rows)
        groups = widen(weight[some]).to(dtype).unflatten(1, (G, C // G)) * scale[some].to(dtype).unsqueeze(-1)
        y[..., some] = torch.nn.functional.linear(
            wide, groups.flatten(1), None if bias is None else bias[some].to(dtype)
        )
    return y


@plain_op
def linear_int8(x, weight, scale, bias):
    """jet::linear_int8: weight [P,C] int8, scale [P,G] fp32; x, bias and y as in `linear`."""
    return _linear_of(x, weight, scale, bias, lambda w: w)


@plain_op
def linear_int4(x, weight, scale, bias):
    """jet::linear_int4: weight [P,C/2] uint8, the columns 2j and 2j+1 in the halves of byte j, plus 8."""
    return _linear_of(
        x, weight, scale, bias, lambda w: (torch.stack([w & 15, w >> 4], -1).to(torch.int8) - 8).flatten(1)
    )
