"""The gated delta rule of other models (Qwen3-Next, Qwen3.5) on the pools that engines keep for it, [P, H, V, K]."""

from __future__ import annotations

import torch
from torch import Tensor

from jetkernels.ops import prefill_gated_delta_rule_, recurrent_gated_delta_rule_

from .jet_block import put_, take

CHUNK = 64  # tokens between the states that an engine may keep of a prompt


def split_heads(mixed_qkv: Tensor, pool: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[total, 2 Hk K + H V] -> views q, k [total, Hk, K] and v [total, H, V], for a pool [P, H, V, K]."""
    H, V, K = pool.shape[1:]
    width = (mixed_qkv.shape[-1] - H * V) // 2
    q, k, v = mixed_qkv.split([width, width, H * V], dim=-1)
    return q.unflatten(-1, (-1, K)), k.unflatten(-1, (-1, K)), v.unflatten(-1, (H, V))


def decode_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    pool: Tensor,
    state_indices: Tensor,
) -> Tensor:
    """A token of each sequence, with the gates as they are projected.

    Args:
        q: [N, Hk, K], before the l2norm, as k.
        k: [N, Hk, K].
        v: [N, H, V].
        a: [N, H], of the decay.
        b: [N, H], of the writing strength.
        A_log: [H].
        dt_bias: [H].
        pool: [P, H, V, K], updated in place.
        state_indices: [N]; a negative one touches no state.

    Returns: [N, H, V].
    """
    q, k, v, a, b = (t.unsqueeze(1) for t in (q, k, v, a, b))
    return recurrent_gated_delta_rule_(
        q,
        k,
        v,
        a,
        b,
        pool.mT,
        state_indices,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        A_log=A_log,
        dt_bias=dt_bias,
        use_beta_sigmoid_in_kernel=True,
    ).squeeze(1)


def prefill_(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    *,
    pool: Tensor,
    cu_seqlens: Tensor,
    state_indices: Tensor,
    has_initial_state: Tensor | None = None,
    track_state: Tensor | None = None,
    track_chunk_idx: Tensor | None = None,
) -> Tensor:
    """Prompts, or pieces of them.

    Args:
        tokens: q and k [1, total, Hk, K] before the l2norm, v [1, total, H, V], the logarithm of the decay and the
            writing strength [1, total, H].
        pool: [P, H, V, K], updated in place.
        cu_seqlens: [N + 1].
        state_indices: [N]; a negative one touches no state.
        has_initial_state: [N] bool; None: all have one.
        track_state: [N, H, V, K] fp32, that takes the state of each sequence before its chunk of 64 tokens of this
            number, where that is not negative; other rows are not defined.
        track_chunk_idx: [N], these numbers.

    Returns: [1, total, H, V].
    """
    if track_state is None or track_chunk_idx is None:
        return prefill_gated_delta_rule_(
            *tokens, pool.mT, cu_seqlens, state_indices, has_initial_state, use_qk_l2norm_in_kernel=True
        )
    # On a pool of these sequences alone, each with a row more for what is tracked.
    N = state_indices.shape[0]
    before = take(pool, state_indices)
    if has_initial_state is not None:
        before = torch.where(has_initial_state.view(-1, 1, 1, 1), before, 0)
    own = torch.cat([before, before]).to(track_state.dtype)
    rows = torch.arange(N, device=pool.device)
    o = prefill_gated_delta_rule_(
        *tokens,
        own.mT,
        cu_seqlens,
        torch.where(state_indices >= 0, rows, -1),
        mark_tokens=cu_seqlens[:-1] + CHUNK * track_chunk_idx,
        mark_indices=torch.where(track_chunk_idx > 0, N + rows, -1),
        use_qk_l2norm_in_kernel=True,
    )
    track_state.copy_(own[N:])
    put_(pool, state_indices, own[:N])
    return o
