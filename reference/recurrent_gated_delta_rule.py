"""The gated delta rule, token by token: the definition of the delta-rule ops.

Source: Gated Delta Networks (arXiv 2412.06464, section 3); used by JetBlock (arXiv 2508.15884, section 2.3).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from reference._sequences import per_pool_row, per_sequence

L2NORM_EPS = 1e-6


def l2norm(x: Tensor) -> Tensor:
    """The l2norm over the last dimension, x / sqrt(sum x^2 + eps); an all-zero row gives zeros."""
    return x / (x.square().sum(-1, keepdim=True) + L2NORM_EPS).sqrt()


def per_value_head(x: Tensor, H: int) -> Tensor:
    """[B, T, Hk, K] -> [B, T, H, K]: value head h reads query/key head h // (H // Hk)."""
    return x.repeat_interleave(H // x.shape[2], 2) if x.shape[2] else x


def token_steps(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor, scale: float, l2norm_qk: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One token after the other, all in one dtype.

    Args:
        q: [B, T, Hk, K].
        k: [B, T, Hk, K].
        v: [B, T, H, V].
        g: [B, T, H], natural-log decay, <= 0; ``-inf`` forgets everything.
        beta: [B, T, H].
        S: [B, H, K, V], the state before the first token.
        scale: factor of the outputs.
        l2norm_qk: whether q and k are normalised first.

    Yields:
        o_t [B, H, V], u_t [B, H, V] and S [B, H, K, V] after token t.
    """
    H = v.shape[2]
    if l2norm_qk:
        q, k = l2norm(q), l2norm(k)
    q, k = per_value_head(q, H), per_value_head(k, H)
    for t in range(v.shape[1]):
        S = g[:, t, :, None, None].exp() * S  # S  <- exp(g_t) S
        prediction = torch.einsum("bhkv,bhk->bhv", S, k[:, t])  #       S^T k_t, decayed state
        u = beta[:, t, :, None] * (v[:, t] - prediction)  # u  =  beta_t (v_t - S^T k_t)
        S = S + k[:, t, :, :, None] * u[:, :, None, :]  # S  <- S + k_t u^T
        yield scale * torch.einsum("bhkv,bhk->bhv", S, q[:, t]), u, S  # o_t = scale S^T q_t


def token_loop(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, S: Tensor, scale: float, l2norm_qk: bool
) -> tuple[Tensor, Tensor]:
    """One sequence per row, all in one dtype: o [B,T,H,V] and the state after the last token."""
    o = []
    for o_t, _, S_t in token_steps(q, k, v, g, beta, S, scale, l2norm_qk):
        o.append(o_t)
        S = S_t
    return torch.stack(o, 1) if o else torch.zeros_like(v), S


def zero_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Zeros [N, H, K, V]."""
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_zeros((N, v.shape[2], q.shape[3], v.shape[3]), dtype=dtype)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    l2norm_qk: bool,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """The token loop with the arguments of ``jet::chunk_gated_delta_rule``.

    Args:
        q: [B, T, Hk, K].
        k: [B, T, Hk, K].
        v: [B, T, H, V].
        g: [B, T, H], natural-log decay, <= 0; ``-inf`` forgets everything.
        beta: [B, T, H].
        initial_state: [N, H, K, V] or ``None`` for zeros.
        cu_seqlens: [N + 1] bounds of packed sequences (B = 1) or ``None``.
        scale: factor of the outputs.
        l2norm_qk: whether q and k are normalised first.
        dtype: what everything is computed in, and what is returned.

    Returns:
        o [B, T, H, V] and final_state [N, H, K, V], in ``dtype``.
    """
    tokens = tuple(t.to(dtype) for t in (q, k, g, beta, v))
    S = zero_state(q, v, cu_seqlens, dtype) if initial_state is None else initial_state.to(dtype)

    def define(q, k, g, beta, v, S):
        return token_loop(q, k, v, g, beta, S, scale, l2norm_qk)

    return per_sequence(define, tokens, S, cu_seqlens)


def recurrent_gated_delta_rule(
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
) -> tuple[Tensor, Tensor]:
    """``jet::recurrent_gated_delta_rule`` out of place.

    Args:
        q: [N, T, Hk, K].
        k: [N, T, Hk, K].
        v: [N, T, H, V].
        g: [N, T, H], natural-log decay, <= 0; ``-inf`` forgets everything.
        beta: [N, T, H].
        state: [P, H, K, V] pool.
        state_indices: [N] pool rows or ``None`` for row n; a negative index touches no state and gives a zero output.
        scale: factor of the outputs.
        l2norm_qk: whether q and k are normalised first.
        dtype: what everything is computed in, and what is returned.

    Returns:
        o [N, T, H, V] and the pool after the call [P, H, K, V], in ``dtype``.
    """
    tokens = tuple(t.to(dtype) for t in (q, k, g, beta, v))

    def define(q, k, g, beta, v, S):
        return token_loop(q, k, v, g, beta, S, scale, l2norm_qk)

    return per_pool_row(define, tokens, state.to(dtype), state_indices)
