"""Verify of the recurrent gated delta rule on copies of the states, in plain PyTorch."""

import torch

from ._compute import contiguous_as, plain_op
from ._pool import PoolRows
from .recurrent_gated_delta_rule import normed, run_tokens


@plain_op
def recurrent_gated_delta_rule_verify(q, k, v, g, beta, state, state_indices, keys, updates, scale, l2norm_qk):
    """jet::recurrent_gated_delta_rule_verify.

    The arguments of jet::recurrent_gated_delta_rule, of which the state is only read, and keys [N,T,Hk,K] and
    updates [N,T,H,V] in the accumulation dtype, which are written -> o. Where the index is negative all three are
    zeros.
    """
    rows = PoolRows(state, state_indices, v.shape[0])
    q, k = normed(q, k, l2norm_qk)
    if v.numel() == 0 or state.numel() == 0:
        keys.copy_(rows.mask(k)), updates.zero_()
        return torch.zeros_like(v, memory_format=torch.contiguous_format)
    s = rows.take().to(k.dtype).flatten(0, 1)
    o, u = run_tokens(q, k, v, g, beta, s, scale)
    keys.copy_(rows.mask(k))
    updates.copy_(rows.mask(u))
    return contiguous_as(rows.mask(o), v.dtype)
