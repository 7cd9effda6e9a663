"""The recurrences of the blocks that are no gated delta rule: linear attention with decay, and RWKV-7's.

Symbols as elsewhere: q and k [B, T, H, K], v [B, T, H, V], state [B, H, K, V]; plain PyTorch, differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 16  # tokens whose pairwise decays are held at once: [CHUNK, CHUNK, K] per head


def decayed_linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S <- diag(exp(g_t)) S + k_t v_t^T;  o_t = S^T q_t.  Returns o [B, T, H, V] and the last state.

    g: log decay <= 0, [B, T, H, K], or [B, T, H, 1] for one rate per head. Chunk by chunk; exponents are differences of
    later and earlier cumulative decays, so that none is positive.
    """
    outputs = []
    for q, k, v, g in zip(*(t.split(CHUNK, 1) for t in (q, k, v, g))):
        c = g.cumsum(1)
        C = q.shape[1]
        earlier = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()[:, :, None, None]
        decay = (c[:, :, None] - c[:, None]).masked_fill(~earlier, -torch.inf).exp()
        weights = (q[:, :, None] * k[:, None] * decay).sum(-1)
        inside = torch.einsum("bijh,bjhv->bihv", weights, v)
        outputs.append(inside + torch.einsum("bihk,bhkv->bihv", q * c.exp(), state))
        last = c[:, -1]
        added = torch.einsum("bjhk,bjhv->bhkv", k * (last[:, None] - c).exp(), v)
        state = last.exp().expand(*last.shape[:-1], state.shape[2])[..., None] * state + added
    return torch.cat(outputs, 1), state


def rwkv7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """S <- (diag(w_t) - (a_t kappa_t) kappa_t^T) S + k_t v_t^T;  o_t = S^T r_t  (arXiv 2503.14456, with S transposed).

    w: decay in (0, 1), kappa: unit removal key, a: in-context rate, all [B, T, H, K]. Token by token.
    Returns o [B, T, H, V] and the last state.
    """
    outputs = []
    for r, w, k, v, kappa, a in zip(*(t.unbind(1) for t in (r, w, k, v, kappa, a))):
        removed = torch.einsum("bhk,bhkv->bhv", kappa, state)
        state = w[..., None] * state - (a * kappa)[..., None] * removed[:, :, None] + k[..., None] * v[:, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", r, state))
    return torch.stack(outputs, 1), state
