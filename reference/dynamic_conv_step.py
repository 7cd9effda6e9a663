"""One token of the dynamic convolution for each sequence, with a pool of states."""

import torch
from torch import Tensor

from reference._sequences import per_pool_row
from reference.dynamic_conv import dynamic_conv


def dynamic_conv_step(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    state_indices: Tensor | None,
    silu: bool,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``jet::dynamic_conv_step`` out of place: :func:`dynamic_conv` with T = 1 on each addressed row.

    Args:
        x: [N, D].
        hidden: [N, R].
        weight: [D * W, R].
        bias: [D * W] or ``None``.
        conv_state: [P, D, W - 1] pool.
        state_indices: [N] pool rows or ``None`` for row n; a negative index touches no state and gives a zero output.
        silu: whether SiLU follows.
        dtype: what everything is computed in, and what is returned.

    Returns:
        y [N, D] and the pool after the call [P, D, W - 1], in ``dtype``.
    """

    def define(hidden, x, state):
        y, state_out = dynamic_conv(x[:, None], hidden[:, None], weight, bias, state, None, silu, dtype)
        return y[:, 0], state_out

    return per_pool_row(define, (hidden.to(dtype), x.to(dtype)), conv_state.to(dtype), state_indices)
