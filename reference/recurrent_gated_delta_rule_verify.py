"""Outputs of draft tokens, and what the state needs to advance by any prefix of them: speculative decoding, first half.

Source: the gated delta rule, Gated Delta Networks (arXiv 2412.06464); speculative decoding, arXiv 2211.17192.
"""

import torch
from torch import Tensor

from reference._sequences import per_pool_row
from reference.recurrent_gated_delta_rule import l2norm, token_steps


def recurrent_gated_delta_rule_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_indices: Tensor | None,
    scale: float,
    l2norm_qk: bool,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """``jet::recurrent_gated_delta_rule_verify`` with the caller's buffers returned instead of written.

    Args:
        q: [N, T, Hk, K].
        k: [N, T, Hk, K].
        v: [N, T, H, V].
        g: [N, T, H], natural-log decay, <= 0; ``-inf`` forgets everything.
        beta: [N, T, H].
        state: [P, H, K, V] pool, only read.
        state_indices: [N] pool rows or ``None`` for row n.
        scale: factor of the outputs.
        l2norm_qk: whether q and k are normalised first.
        dtype: what everything is computed in, and what is returned.

    Returns:
        o [N, T, H, V]; keys [N, T, Hk, K], the k_t after the l2norm; updates [N, T, H, V], the u_t. In ``dtype``; zeros
        where the index is negative.
    """
    q, k, v, g, beta, state = (t.to(dtype) for t in (q, k, v, g, beta, state))

    def outputs(which: int) -> Tensor:
        def define(q, k, g, beta, v, S):
            steps = [step[which] for step in token_steps(q, k, v, g, beta, S, scale, l2norm_qk)]
            return torch.stack(steps, 1) if steps else torch.zeros_like(v), S

        return per_pool_row(define, (q, k, g, beta, v), state, state_indices)[0]

    keys, _ = per_pool_row(lambda k, S: (l2norm(k) if l2norm_qk else k, S), (k,), state, state_indices)
    return outputs(0), keys, outputs(1)
