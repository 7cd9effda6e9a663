"""The recurrences of the blocks that are no gated delta rule: linear attention with decay, and RWKV-7's.

Symbols as elsewhere: q and k [B, T, H, K], v [B, T, H, V], state [B, H, K, V]; plain PyTorch, differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce, wraps

import torch
from torch import Tensor

CHUNK = 16  # tokens whose pairwise decays are held at once: [CHUNK, CHUNK, K] per head
Recurrence = Callable[..., tuple[Tensor, Tensor]]


def _in_one_dtype(recurrence: Recurrence) -> Recurrence:
    """Gives the results the widest of the arguments' dtypes, under autocast too, and computes in fp32 at least.

    Errors of a state add up over the tokens.
    """

    @wraps(recurrence)
    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(tensors[0].device.type, enabled=False):
            o, state = recurrence(*(t.to(wide) for t in tensors))
        return o.to(dtype), state.to(dtype)

    return call


@_in_one_dtype
def decayed_linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Linear attention with decay: S <- diag(exp(g_t)) S + k_t v_t^T;  o_t = S^T q_t.

    Chunk by chunk. The decay between two tokens is exp of the sum of g over the tokens between them, taken over these
    alone: differences of one cumulative sum would have dg subtract terms from themselves, and what is left of that is
    many times dg under strong decay.

    Args:
        q: [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        g: log decay <= 0, -inf to forget everything, [B, T, H, K], or [B, T, H, 1] for one rate per head.
        state: [B, H, K, V], before the first token.

    Returns: o [B, T, H, V] and the state behind the last token.
    """
    outputs = []
    for q, k, v, g in zip(*(t.split(CHUNK, 1) for t in (q, k, v, g))):
        C = q.shape[1]
        seen = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
        not_seen, not_before = (~mask[:, :, None, None] for mask in (seen, seen.tril(-1)))
        # [B, i, j, H, K]: the sum of g behind token j, up to token i.
        between = g[:, :, None].masked_fill(not_before, 0).cumsum(1)
        decay = between.masked_fill(not_seen, -torch.inf).exp()
        if g.shape[-1] == 1:
            weights = torch.einsum("bihk,bjhk->bijh", q, k) * decay.squeeze(-1)
        else:
            weights = (q[:, :, None] * k[:, None] * decay).sum(-1)
        inside = torch.einsum("bijh,bjhv->bihv", weights, v)
        kept = g.cumsum(1).exp()
        outputs.append(inside + torch.einsum("bihk,bhkv->bihv", q * kept, state))
        added = torch.einsum("bjhk,bjhv->bhkv", k * decay[:, -1], v)
        state = kept[:, -1, ..., None] * state + added
    return torch.cat(outputs, 1), state


@_in_one_dtype
def rwkv7(r: Tensor, g: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """RWKV-7's recurrence: S <- (diag(exp(g_t)) - (a_t kappa_t) kappa_t^T) S + k_t v_t^T;  o_t = S^T r_t.

    Chunk by chunk, c the cumulative g: what is removed, u_t = S_{t-1}^T kappa_t, solves (I + M) u = N v + S_0^T (kappa
    exp(c - g)), where M and N pair kappa with the earlier a kappa and k. The decay between two tokens is a product of
    two factors around the middle of the chunk's decay, of at most exp(CHUNK e^-0.5 / 2) = 128 each.

    Args:
        r: [B, T, H, K].
        g: log decay, which RWKV-7 keeps in [-e^-0.5, 0], [B, T, H, K].
        k: [B, T, H, K].
        v: [B, T, H, V].
        kappa: unit removal key, [B, T, H, K].
        a: in-context rate, [B, T, H, K].
        state: [B, H, K, V], before the first token.

    Returns: o [B, T, H, V] and the state behind the last token.

    Source: arXiv 2503.14456, with S transposed.
    """
    outputs = []
    for r, g, k, v, kappa, a in zip(*(t.transpose(1, 2).split(CHUNK, 2) for t in (r, g, k, v, kappa, a))):
        c = g.cumsum(2)
        last = c[:, :, -1:]
        grown = (last / 2 - c).exp()
        sources = torch.cat([k * grown, a * kappa * grown], 2)
        C = k.shape[2]
        N, M = ((kappa * (c - g - last / 2).exp()) @ sources.mT).split(C, -1)
        told = N.tril(-1) @ v + (kappa * (c - g).exp()) @ state
        u = torch.linalg.solve_triangular(M.tril(-1), told, upper=False, unitriangular=True)
        of_k, of_taken = ((r * (c - last / 2).exp()) @ sources.mT).split(C, -1)
        outputs.append(of_k.tril() @ v - of_taken.tril() @ u + (r * c.exp()) @ state)
        left = sources * (last / 2).exp()
        state = last.exp().mT * state + left.mT @ torch.cat([v, -u], 2)
    return torch.cat(outputs, 2).transpose(1, 2), state
