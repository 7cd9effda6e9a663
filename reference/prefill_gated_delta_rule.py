"""The gated delta rule over packed sequences on a pool: the definition of ``jet::prefill_gated_delta_rule``."""

import torch
from torch import Tensor

from reference.recurrent_gated_delta_rule import token_steps


def prefill_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_indices: Tensor | None,
    cu_seqlens: Tensor,
    has_initial_state: Tensor | None,
    mark_tokens: Tensor | None,
    mark_indices: Tensor | None,
    scale: float,
    l2norm_qk: bool,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """``jet::prefill_gated_delta_rule`` out of place.

    Args:
        q: [1, T, Hk, K].
        k: [1, T, Hk, K].
        v: [1, T, H, V].
        g: [1, T, H], natural-log decay, <= 0; ``-inf`` forgets everything.
        beta: [1, T, H].
        state: [P, H, K, V] pool.
        state_indices: [N] pool rows or ``None`` for row n; a negative index touches no state and gives zero outputs.
        cu_seqlens: [N + 1] bounds of the sequences.
        has_initial_state: [N] whether a sequence goes on from its row or begins with zeros, or ``None`` for all do.
        mark_tokens: [M] numbers of tokens after which the state is kept, or ``None``.
        mark_indices: [M] the pool row of each mark, negative for none.
        scale: factor of the outputs.
        l2norm_qk: whether q and k are normalised first.
        dtype: what everything is computed in, and what is returned.

    Returns:
        o [1, T, H, V] and the pool after the call [P, H, K, V], in ``dtype``.
    """
    q, k, v, g, beta, before = (t.to(dtype) for t in (q, k, v, g, beta, state))
    bounds = cu_seqlens.tolist()
    rows = range(len(bounds) - 1) if state_indices is None else state_indices.tolist()
    goes_on = [True] * len(bounds) if has_initial_state is None else has_initial_state.tolist()
    pairs = [] if mark_tokens is None else zip(mark_tokens.tolist(), mark_indices.tolist())
    marks = {token: row for token, row in pairs if row >= 0}
    o, pool = torch.zeros_like(v), before.clone()
    for n, row in enumerate(rows):
        if row < 0:
            continue
        S = before[row : row + 1] if goes_on[n] else torch.zeros_like(before[row : row + 1])
        begin, end = bounds[n], bounds[n + 1]
        tokens = (t[:, begin:end] for t in (q, k, v, g, beta))
        for t, (o_t, _, S_t) in enumerate(token_steps(*tokens, S, scale, l2norm_qk), begin):
            o[:, t], S = o_t, S_t
            if t + 1 in marks:
                pool[marks[t + 1]] = S[0]
        pool[row] = S[0]
    return o, pool
