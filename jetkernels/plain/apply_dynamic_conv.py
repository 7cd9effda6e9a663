"""Causal convolution with W given taps per token and channel, and its backward, in plain PyTorch."""

import torch

from ._compute import accumulation_dtype, plain_op
from ._taps import TapRows, silu_backward


def convolve(rows, tile, tap, width, dtype):
    """sum_w tap_w * input_w before the activation, [tile,D]; tap(w) gives tap_w [tile,D]."""
    total = tap(0) * rows.read(tile, 0, dtype)
    for w in range(1, width):
        total.addcmul_(tap(w), rows.read(tile, w, dtype))
    return total


def finish(rows, total, tile, silu):
    """Activation, and zeros for tokens outside every sequence."""
    return rows.covered_only(torch.nn.functional.silu(total) if silu else total, tile)


def start_gradient(rows, grad_y, total, tile, silu, dtype):
    """Gradient of `total` [tile,D] from grad_y [B*T,D]."""
    grad = grad_y[tile].to(dtype)
    return rows.covered_only(silu_backward(grad, total) if silu else grad, tile)


def start_table_gradient(rows, grad_conv_state_out, dtype):
    """Gradient of the table as far as the outgoing conv_state [N,D,W-1] causes it."""
    grad_table = rows.table.new_zeros(rows.table.shape, dtype=dtype)
    if grad_conv_state_out is not None:
        channels = rows.shape[2]
        grad_table.index_add_(0, rows.last_rows, grad_conv_state_out.transpose(1, 2).reshape(-1, channels).to(dtype))
    return grad_table


@plain_op
def apply_dynamic_conv(x, taps, conv_state, cu_seqlens, silu):
    """jet::apply_dynamic_conv.

    x [B,T,D], taps [B,T,D,W] (the op's `kernels`), conv_state [N,D,W-1] or None, all in one dtype,
    cu_seqlens [N+1] or None -> y [B,T,D], conv_state_out [N,D,W-1] in that dtype.
    """
    dtype, width = accumulation_dtype(x), taps.shape[3]
    rows = TapRows(x, conv_state, cu_seqlens, width)
    taps = taps.flatten(0, 1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat = y.flatten(0, 1)
    for tile in rows.tiles():
        total = convolve(rows, tile, lambda w: taps[tile, :, w].to(dtype), width, dtype)
        flat[tile].copy_(finish(rows, total, tile, silu))
    return y, rows.final_state()


@plain_op
def apply_dynamic_conv_backward(grad_y, grad_conv_state_out, x, taps, conv_state, cu_seqlens, silu):
    """jet::apply_dynamic_conv_backward.

    grad_y [B,T,D], grad_conv_state_out [N,D,W-1] or None, then the arguments of the forward op
    -> gradients of x, taps and conv_state [N,D,W-1], all in the dtype of x.
    """
    dtype, width = accumulation_dtype(x), taps.shape[3]
    rows = TapRows(x, conv_state, cu_seqlens, width)
    dtaps = torch.empty(taps.shape, dtype=taps.dtype, device=taps.device)
    taps, flat, grad_y = taps.flatten(0, 1), dtaps.flatten(0, 1), grad_y.flatten(0, 1)
    grad_table = start_table_gradient(rows, grad_conv_state_out, dtype)
    for tile in rows.tiles():
        total = convolve(rows, tile, lambda w: taps[tile, :, w].to(dtype), width, dtype) if silu else None
        grad = start_gradient(rows, grad_y, total, tile, silu, dtype)
        for w in range(width):
            flat[tile, :, w] = grad * rows.read(tile, w, dtype)
            grad_table.index_add_(0, rows.tap_rows(tile, w), grad * taps[tile, :, w])
    dx, dconv_state = rows.split_gradient(grad_table)
    return dx, dtaps, dconv_state
