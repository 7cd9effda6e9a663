"""Recurrent gated delta rule, token by token on the rows of a state pool, in plain PyTorch."""

import torch

from ._compute import accumulation_dtype, contiguous_as, plain_op
from ._pool import PoolRows
from .chunk_gated_delta_rule import l2norm


def head_rows(x, dtype, heads):
    """[N,T,Hx,...] -> contiguous [T,N*H,...] in `dtype`, a query/key head once for each value head reading it."""
    x = x.transpose(0, 1).to(dtype)
    groups = heads // x.shape[2] if x.shape[2] else 1
    return x.unsqueeze(3).expand(-1, -1, -1, groups, *x.shape[3:]).flatten(1, 3)


def normed(q, k, l2norm_qk):
    """q, k in the accumulation dtype, after the l2norm if there is one."""
    q, k = (x.to(accumulation_dtype(x)) for x in (q, k))
    return (l2norm(q)[0], l2norm(k)[0]) if l2norm_qk else (q, k)


def run_tokens(q, k, v, g, beta, s, scale):
    """The recurrence on states s [N*H,K,V], in place; q, k as `normed` returns them -> o, u [N,T,H,V] in s's dtype."""
    n, tokens, heads = v.shape[:3]
    dtype = s.dtype
    q = (head_rows(q, dtype, heads) * scale).unsqueeze(-2)
    k = head_rows(k, dtype, heads).unsqueeze(-2)
    v = head_rows(v, dtype, heads).unsqueeze(-2)
    decay = head_rows(g, dtype, heads).exp()[..., None, None]
    strength = head_rows(beta, dtype, heads)[..., None, None]
    o, u = torch.empty_like(v), torch.empty_like(v)
    for t in range(tokens):
        s.mul_(decay[t])
        # u = beta (v - Sᵀ k)   [1, V]
        torch.baddbmm(v[t], k[t], s, alpha=-1, out=u[t]).mul_(strength[t])
        # S += k uᵀ   [K, V]
        s.baddbmm_(k[t].transpose(-1, -2), u[t])
        # o = scale Sᵀ q   [1, V]
        torch.bmm(q[t], s, out=o[t])
    return tuple(x.view(tokens, n, heads, -1).transpose(0, 1) for x in (o, u))


@plain_op
def recurrent_gated_delta_rule(q, k, v, g, beta, state, state_indices, scale, l2norm_qk):
    """jet::recurrent_gated_delta_rule.

    q, k [N,T,Hk,K], v [N,T,H,V], g, beta [N,T,H], state [P,H,K,V] updated in place, state_indices [N] or None
    -> o [N,T,H,V] in v's dtype; zeros where the index is negative, and no row of the pool changes for it.
    The state is rounded to the pool's dtype once, after the last token.
    """
    if v.numel() == 0 or state.numel() == 0:
        return torch.zeros_like(v, memory_format=torch.contiguous_format)
    rows = PoolRows(state, state_indices, v.shape[0])
    old = rows.take()
    s = old.to(accumulation_dtype(q), copy=True).flatten(0, 1)
    q, k = normed(q, k, l2norm_qk)
    o, _ = run_tokens(q, k, v, g, beta, s, scale)
    rows.put(old, s.view(old.shape))
    return contiguous_as(rows.mask(o), v.dtype)
