"""Causal convolution whose taps are generated from `hidden`, and its backward, in plain PyTorch.

A tap is generated for one tile of tokens at a time, [tile,D]; no tensor [B,T,D,W] is made.
"""

import torch

from ._compute import accumulation_dtype, contiguous_as, plain_op
from ._taps import TapRows
from .apply_dynamic_conv import convolve, finish, start_gradient, start_table_gradient


class Generator:
    """tap_w = hidden weight_wᵀ + bias_w, [rows,D] in the dtype of the arithmetic."""

    def __init__(self, weight, bias, width, dtype):
        self.width = width
        # row d*W+w of weight generates tap w of channel d   [W, D, R]
        self.weight = contiguous_as(weight.unflatten(0, (-1, width)).transpose(0, 1), dtype)
        self.bias = None if bias is None else contiguous_as(bias.unflatten(0, (-1, width)).transpose(0, 1), dtype)

    def tap(self, hidden, w):
        """Tap w of every channel for `hidden` [rows,R]."""
        if self.bias is None:
            return torch.mm(hidden, self.weight[w].t())
        return torch.addmm(self.bias[w], hidden, self.weight[w].t())


@plain_op
def dynamic_conv(x, hidden, weight, bias, conv_state, cu_seqlens, silu):
    """jet::dynamic_conv.

    x [B,T,D], hidden [B,T,R], weight [D*W,R], bias [D*W] or None, conv_state [N,D,W-1] or None,
    cu_seqlens [N+1] or None, all floating tensors in one dtype -> y [B,T,D], conv_state_out [N,D,W-1] in that dtype.
    """
    dtype, width = accumulation_dtype(x), weight.shape[0] // x.shape[2]
    rows = TapRows(x, conv_state, cu_seqlens, width)
    generator = Generator(weight, bias, width, dtype)
    hidden = hidden.flatten(0, 1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat = y.flatten(0, 1)
    for tile in rows.tiles():
        source = hidden[tile].to(dtype)
        total = convolve(rows, tile, lambda w: generator.tap(source, w), width, dtype)
        flat[tile].copy_(finish(rows, total, tile, silu))
    return y, rows.final_state()


@plain_op
def dynamic_conv_backward(grad_y, grad_conv_state_out, x, hidden, weight, bias, conv_state, cu_seqlens, silu):
    """jet::dynamic_conv_backward.

    grad_y [B,T,D], grad_conv_state_out [N,D,W-1] or None, then the arguments of the forward op
    -> gradients of x, hidden, weight, bias [D*W] and conv_state [N,D,W-1], all in the dtype of x.
    """
    dtype, width = accumulation_dtype(x), weight.shape[0] // x.shape[2]
    rows = TapRows(x, conv_state, cu_seqlens, width)
    generator = Generator(weight, bias, width, dtype)
    dweight = torch.zeros_like(generator.weight)
    dbias = dweight.new_zeros(width, x.shape[2])
    dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    hidden, flat, grad_y = hidden.flatten(0, 1), dhidden.flatten(0, 1), grad_y.flatten(0, 1)
    grad_table = start_table_gradient(rows, grad_conv_state_out, dtype)
    for tile in rows.tiles():
        source = hidden[tile].to(dtype)
        taps = [generator.tap(source, w) for w in range(width)]
        total = convolve(rows, tile, taps.__getitem__, width, dtype) if silu else None
        grad = start_gradient(rows, grad_y, total, tile, silu, dtype)
        dsource = torch.zeros_like(source)
        for w in range(width):
            dtap = grad * rows.read(tile, w, dtype)
            dsource.addmm_(dtap, generator.weight[w])
            dweight[w].addmm_(dtap.t(), source)
            dbias[w].add_(dtap.sum(0))
            grad_table.index_add_(0, rows.tap_rows(tile, w), taps[w].mul_(grad))
        flat[tile].copy_(dsource)
    dx, dconv_state = rows.split_gradient(grad_table)
    dweight = contiguous_as(dweight.transpose(0, 1), x.dtype).view(weight.shape)
    return dx, dhidden, dweight, contiguous_as(dbias.t(), x.dtype).flatten(), dconv_state
