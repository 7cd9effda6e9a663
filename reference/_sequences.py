"""How a definition for plain rows extends to packed sequences and to a pool of states."""

from collections.abc import Callable

import torch
from torch import Tensor


def per_sequence(
    define: Callable[..., tuple[Tensor, Tensor]], tokens: tuple[Tensor, ...], state: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A definition for rows of one sequence, applied to each packed sequence apart.

    Args:
        define: ``define(*tokens, state) -> (out, state_out)``, for any number of rows.
        tokens: tensors [B, T, ...]; ``out`` has the shape of the last one.
        state: [N, ...], one row per sequence.
        cu_seqlens: [N + 1] bounds of the sequences in the one row (B = 1), or ``None``: each row is a sequence.

    Returns:
        out [B, T, ...] and the states after the sequences [N, ...].
    """
    if cu_seqlens is None:
        return define(*tokens, state)
    bounds = cu_seqlens.tolist()
    outs, states = [tokens[-1][:, :0]], [state[:0]]
    for n, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:])):
        out, state_out = define(*(t[:, begin:end] for t in tokens), state[n : n + 1])
        outs.append(out)
        states.append(state_out)
    return torch.cat(outs, 1), torch.cat(states)


def per_pool_row(
    define: Callable[..., tuple[Tensor, Tensor]], tokens: tuple[Tensor, ...], pool: Tensor, state_indices: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A definition for rows with a state, applied to each sequence with its row of the pool.

    Args:
        define: ``define(*tokens, state) -> (out, state_out)``, for one row.
        tokens: tensors [N, ...]; ``out`` has the shape of the last one.
        pool: [P, ...].
        state_indices: [N], the row of each sequence, or ``None``: row n for sequence n. A negative index touches no row
            and gives a zero ``out``.

    Returns:
        out [N, ...], and the pool after the call [P, ...].
    """
    rows = range(tokens[0].shape[0]) if state_indices is None else state_indices.tolist()
    outs, after = [tokens[-1][:0]], list(pool.split(1))
    for n, row in enumerate(rows):
        if row < 0:
            outs.append(torch.zeros_like(tokens[-1][n : n + 1]))
            continue
        out, after[row] = define(*(t[n : n + 1] for t in tokens), pool[row : row + 1])
        outs.append(out)
    return torch.cat(outs), torch.cat([pool[:0], *after])
