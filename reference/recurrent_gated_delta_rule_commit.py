"""The state after the accepted prefix of draft tokens: speculative decoding, second half.

Source: the gated delta rule, Gated Delta Networks (arXiv 2412.06464); speculative decoding, arXiv 2211.17192.
"""

import torch
from torch import Tensor

from reference._sequences import per_pool_row
from reference.recurrent_gated_delta_rule import per_value_head


def recurrent_gated_delta_rule_commit(
    keys: Tensor,
    updates: Tensor,
    g: Tensor,
    num_accepted: Tensor,
    state: Tensor,
    state_indices: Tensor | None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """``jet::recurrent_gated_delta_rule_commit`` out of place.

    Args:
        keys: [N, T, Hk, K], as verify returned them.
        updates: [N, T, H, V], as verify returned them.
        g: [N, T, H], as it was given to verify.
        num_accepted: [N], 0..T tokens of each sequence.
        state: [P, H, K, V] pool.
        state_indices: [N] pool rows or ``None`` for row n; a negative index touches no state.
        dtype: what everything is computed in, and what is returned.

    Returns:
        The pool after the call [P, H, K, V], in ``dtype``.
    """
    keys, g, updates = (t.to(dtype) for t in (keys, g, updates))
    keys = per_value_head(keys, updates.shape[2])

    def define(num_accepted, keys, g, updates, S):
        for t in range(int(num_accepted)):
            # S <- exp(g_t) S + k_t u_t^T
            S = g[:, t, :, None, None].exp() * S + keys[:, t, :, :, None] * updates[:, t, :, None, :]
        return updates, S

    return per_pool_row(define, (num_accepted, keys, g, updates), state.to(dtype), state_indices)[1]
