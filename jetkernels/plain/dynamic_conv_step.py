"""One token of the dynamic convolution for every sequence, on the rows of a state pool, in plain PyTorch."""

import torch

from ._compute import accumulation_dtype, contiguous_as, plain_op
from ._pool import PoolRows
from .dynamic_conv import Generator


@plain_op
def dynamic_conv_step(x, hidden, weight, bias, conv_state, state_indices, silu):
    """jet::dynamic_conv_step.

    x [N,D], hidden [N,R], weight [D*W,R], bias [D*W] or None, conv_state [P,D,W-1] updated in place,
    state_indices [N] or None, all floating tensors in one dtype -> y [N,D]; zeros where the index is negative, and no
    row of the pool changes for it.
    """
    if x.numel() == 0 or conv_state.numel() == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    dtype, width = accumulation_dtype(x), weight.shape[0] // x.shape[1]
    rows = PoolRows(conv_state, state_indices, x.shape[0])
    old = rows.take()
    window = torch.cat([old, x.unsqueeze(-1)], dim=-1)
    generator = Generator(weight, bias, width, dtype)
    hidden = hidden.to(dtype)
    total = generator.tap(hidden, 0) * window[..., 0]
    for w in range(1, width):
        total.addcmul_(generator.tap(hidden, w), window[..., w].to(dtype))
    rows.put(old, window[..., 1:])
    y = torch.nn.functional.silu(total) if silu else total
    return contiguous_as(rows.mask(y), x.dtype)
