"""Commit of the recurrent gated delta rule on the rows of a state pool, in plain PyTorch."""

import torch

from ._compute import plain_op
from ._pool import PoolRows
from .recurrent_gated_delta_rule import head_rows


@plain_op
def recurrent_gated_delta_rule_commit(keys, updates, g, num_accepted, state, state_indices):
    """jet::recurrent_gated_delta_rule_commit.

    keys [N,T,Hk,K], updates [N,T,H,V] and g [N,T,H] of a verify, num_accepted [N], state [P,H,K,V] updated in place,
    state_indices [N] or None. num_accepted stays on the device: every token is computed and the accepted ones are kept,
    so a number below 0 counts as 0, one above T as T.
    """
    if updates.numel() == 0 or state.numel() == 0:
        return
    n, tokens, heads = updates.shape[:3]
    dtype = updates.dtype
    k = head_rows(keys, dtype, heads).unsqueeze(-1)
    u = head_rows(updates, dtype, heads).unsqueeze(-2)
    decay = head_rows(g, dtype, heads).exp()[..., None, None]
    accepted = num_accepted.repeat_interleave(heads).view(-1, 1, 1)

    rows = PoolRows(state, state_indices, n)
    old = rows.take()
    s = old.to(dtype).flatten(0, 1)
    for t in range(tokens):
        # S <- e^g S + k uᵀ   [K, V]
        s = torch.where(accepted > t, (s * decay[t]).baddbmm_(k[t], u[t]), s)
    # without an accepted token the row keeps its bits, which a way through fp32 need not
    new = s.view(old.shape).to(old.dtype)
    rows.put(old, torch.where(num_accepted.view(-1, 1, 1, 1) > 0, new, old))
