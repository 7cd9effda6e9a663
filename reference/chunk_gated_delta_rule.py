"""The gated delta rule in chunks of C tokens, forward and backward, with one function per stage.

Every stage works on one chunk of any number of rows: q, k [..., C, K], v, R, U [..., C, V], c, beta [..., C],
S0, S1 [..., K, V]. c_i is the chunk-local cumulative sum of g, and Γ_ij = e^{c_i - c_j} for i >= j, else 0.

    kk = tril(K K^T ∘ Γ, -1)      T = (I + diag(beta) kk)^-1
    R  = V - diag(e^c) K S0       U = T diag(beta) R
    O  = scale diag(e^c) Q S0 + P U                    P = scale tril(Q K^T) ∘ Γ
    S1 = e^{c_C} S0 + K^T diag(e^{c_C - c}) U

It equals the token loop: U holds the rows u_t, and (I + diag(beta) kk) U = diag(beta) R is that loop's line for u_t
with the earlier tokens of the chunk moved to the left side.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from reference._sequences import per_sequence
from reference.recurrent_gated_delta_rule import L2NORM_EPS, l2norm, per_value_head, zero_state

CHUNK = 64
MIN_LOG_DECAY = -104.0  # e^-104 is zero in fp32, and sums of it stay finite where -inf - -inf would not


class Chunk(NamedTuple):
    """What forward and backward know of a chunk before they know its state."""

    q: Tensor  # [..., C, K] normalised
    k: Tensor  # [..., C, K] normalised
    v: Tensor  # [..., C, V]
    beta: Tensor  # [..., C]
    c: Tensor  # [..., C]
    Γ: Tensor  # [..., C, C]
    kk: Tensor  # [..., C, C]
    P: Tensor  # [..., C, C]


def gate_cumsum(g: Tensor) -> Tensor:
    """The running sum c [..., C] of g [..., C]."""
    return g.clamp(min=MIN_LOG_DECAY).cumsum(-1)


def decays(c: Tensor) -> Tensor:
    """Γ [..., C, C]; the exponents above the diagonal are masked before exp, which they would overflow."""
    exponent = c[..., :, None] - c[..., None, :]
    lower = torch.ones(exponent.shape[-2:], dtype=torch.bool, device=c.device).tril()
    return exponent.masked_fill(~lower, -torch.inf).exp()


def key_products(k: Tensor, Γ: Tensor) -> Tensor:
    """The strictly lower triangle kk = tril(K K^T ∘ Γ, -1)."""
    return (k @ k.mT * Γ).tril(-1)


def query_key_products(q: Tensor, k: Tensor, Γ: Tensor, scale: float) -> Tensor:
    """P = scale tril(Q K^T) ∘ Γ."""
    return scale * (q @ k.mT * Γ).tril()


def inverse(kk: Tensor, beta: Tensor) -> Tensor:
    """T = (I + diag(beta) kk)^-1, by forward substitution."""
    identity = torch.eye(kk.shape[-1], dtype=kk.dtype, device=kk.device).expand_as(kk)
    return torch.linalg.solve_triangular(identity + beta[..., :, None] * kk, identity, upper=False, unitriangular=True)


def column_inverse(kk: Tensor, beta: Tensor) -> Tensor:
    """(I + kk diag(beta))^-1; diag(beta) times it equals T diag(beta), also where beta is zero."""
    identity = torch.eye(kk.shape[-1], dtype=kk.dtype, device=kk.device).expand_as(kk)
    return torch.linalg.solve_triangular(identity + kk * beta[..., None, :], identity, upper=False, unitriangular=True)


def residual(v: Tensor, k: Tensor, c: Tensor, S0: Tensor) -> Tensor:
    """R = V - diag(e^c) K S0."""
    return v - c.exp()[..., None] * (k @ S0)


def update(T: Tensor, beta: Tensor, R: Tensor) -> Tensor:
    """U = T diag(beta) R."""
    return T @ (beta[..., None] * R)


def output(q: Tensor, c: Tensor, S0: Tensor, P: Tensor, U: Tensor, scale: float) -> Tensor:
    """O = scale diag(e^c) Q S0 + P U."""
    return scale * c.exp()[..., None] * (q @ S0) + P @ U


def next_state(S0: Tensor, k: Tensor, c: Tensor, U: Tensor) -> Tensor:
    """S1 = e^{c_C} S0 + K^T diag(e^{c_C - c}) U."""
    last = c[..., -1:]
    return last.exp()[..., None] * S0 + k.mT @ ((last - c).exp()[..., None] * U)


def prepare(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float) -> Chunk:
    """What a chunk needs beside its state."""
    c = gate_cumsum(g)
    Γ = decays(c)
    return Chunk(q, k, v, beta, c, Γ, key_products(k, Γ), query_key_products(q, k, Γ, scale))


def chunks_of(q, k, v, g, beta, scale: float, chunk_size: int) -> list[Chunk]:
    """Cuts head-first tensors, q, k [B,H,T,K], v [B,H,T,V], g, beta [B,H,T]; the last chunk holds what is left."""
    T = v.shape[2]
    cuts = [slice(begin, min(begin + chunk_size, T)) for begin in range(0, T, chunk_size)]
    return [prepare(*(t[:, :, cut] for t in (q, k, v, g, beta)), scale) for cut in cuts]


def heads_first(q, k, v, g, beta, l2norm_qk: bool) -> tuple[Tensor, ...]:
    """[B,T,heads,...] tensors as the stages want them: normalised, one query/key head per value head, [B,H,T,...]."""
    if l2norm_qk:
        q, k = l2norm(q), l2norm(k)
    q, k = per_value_head(q, v.shape[2]), per_value_head(k, v.shape[2])
    return tuple(t.transpose(1, 2) for t in (q, k, v, g, beta))


def chunk_gated_delta_rule(
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
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """``jet::chunk_gated_delta_rule``; shapes as in :func:`reference.recurrent_gated_delta_rule.gated_delta_rule`."""
    tokens = tuple(t.to(dtype) for t in (q, k, g, beta, v))
    S = zero_state(q, v, cu_seqlens, dtype) if initial_state is None else initial_state.to(dtype)

    def define(q, k, g, beta, v, S):
        o = [v[:, :0].transpose(1, 2)]
        for x in chunks_of(*heads_first(q, k, v, g, beta, l2norm_qk), scale, chunk_size):
            U = update(inverse(x.kk, x.beta), x.beta, residual(x.v, x.k, x.c, S))
            o.append(output(x.q, x.c, S, x.P, U, scale))
            S = next_state(S, x.k, x.c, U)
        return torch.cat(o, 2).transpose(1, 2), S

    return per_sequence(define, tokens, S, cu_seqlens)


# ---- backward: two sweeps over the states, then everything else in parallel over chunks; no division by beta


class Swept(NamedTuple):
    """What the two sweeps leave for the parallel stage of the backward."""

    U: Tensor  # [..., C, V]
    S0: Tensor  # [..., K, V] before the chunk
    dV: Tensor  # [..., C, V]
    dS1: Tensor  # [..., K, V] gradient of the state after the chunk


def update_gradient(x: Chunk, dO: Tensor, dS1: Tensor) -> Tensor:
    """The gradient dU = P^T dO + diag(e^{c_C - c}) K dS1."""
    return x.P.mT @ dO + (x.c[..., -1:] - x.c).exp()[..., None] * (x.k @ dS1)


def state_gradient(x: Chunk, dO: Tensor, dV: Tensor, dS1: Tensor, scale: float) -> Tensor:
    """dS0 = e^{c_C} dS1 + Q^T diag(scale e^c) dO - K^T diag(e^c) dV."""
    e_c = x.c.exp()[..., None]
    return x.c[..., -1:].exp()[..., None] * dS1 + x.q.mT @ (scale * e_c * dO) - x.k.mT @ (e_c * dV)


def gate_gradient(Y: Tensor, read: Tensor, stored: Tensor, through: Tensor, g: Tensor) -> Tensor:
    """dg_t = sum_{j<t<=i} Y_ij + sum_{t<=i} read_i + sum_{j<t} stored_j + through; zero where g was clamped.

    What passes token t, and nothing that would have to cancel: every term has e^{g_t} as a factor, and dg its accuracy
    at any decay.
    """
    passing = [
        Y[..., t:, :t].sum((-2, -1)) + read[..., t:].sum(-1) + stored[..., :t].sum(-1) + through
        for t in range(g.shape[-1])
    ]
    return torch.where(g >= MIN_LOG_DECAY, torch.stack(passing, -1), 0)


def token_gradients(x: Chunk, g: Tensor, dO: Tensor, s: Swept, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK [..., C, K] and dg [..., C] of one chunk."""
    e_c, e_rest = x.c.exp()[..., None], (x.c[..., -1:] - x.c).exp()[..., None]
    dP = scale * (dO @ s.U.mT).tril() * x.Γ  # dP     = scale tril(dO U^T) ∘ Γ
    dM = -(s.dV @ s.U.mT).tril(-1) * x.Γ  # dM     = -tril(dV U^T, -1) ∘ Γ
    dQ_S = scale * e_c * (dO @ s.S0.mT)  # of S0
    dK_S = -e_c * (s.dV @ s.S0.mT)  # likewise
    dQ = dQ_S + dP @ x.k  # dQ     = scale e^c (dO S0^T) + dP K
    dK_row = dK_S + dM @ x.k  # dK_row = -e^c (dV S0^T) + dM K
    dK_st = e_rest * (s.U @ s.dS1.mT)  # dK_st  = e^{c_C - c} (U dS1^T)
    dK_col = dP.mT @ x.q + dM.mT @ x.k + dK_st  # dK_col = dP^T Q + dM^T K + dK_st
    Y = (dP * (x.q @ x.k.mT) + dM * (x.k @ x.k.mT)).tril(-1)  # Y      = tril(dP ∘ Q K^T + dM ∘ K K^T, -1)
    read, stored = (x.q * dQ_S + x.k * dK_S).sum(-1), (x.k * dK_st).sum(-1)
    through = x.c[..., -1].exp() * (s.S0 * s.dS1).sum((-2, -1))
    return dQ, dK_row + dK_col, gate_gradient(Y, read, stored, through, g)


def l2norm_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient dx = (dy - y <y,dy>) / sqrt(sum x^2 + eps) for y = l2norm(x)."""
    y = l2norm(x)
    return (dy - y * (y * dy).sum(-1, keepdim=True)) / (x.square().sum(-1, keepdim=True) + L2NORM_EPS).sqrt()


def sum_value_heads(dx: Tensor, Hk: int) -> Tensor:
    """[B, T, H, K] -> [B, T, Hk, K], the gradient of :func:`per_value_head`."""
    return dx.unflatten(2, (Hk, -1)).sum(3) if Hk else dx


def chunk_gated_delta_rule_backward(
    grad_o: Tensor,
    grad_final_state: Tensor | None,
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
    chunk_size: int = CHUNK,
) -> tuple[Tensor, ...]:
    """``jet::chunk_gated_delta_rule_backward``: gradients of q, k, v, g, beta and initial_state, in ``dtype``."""
    tokens = [t.to(dtype) for t in (grad_o, q, k, v, g, beta)]
    zeros = zero_state(q, v, cu_seqlens, dtype)
    S = zeros if initial_state is None else initial_state.to(dtype)
    dS = zeros if grad_final_state is None else grad_final_state.to(dtype)
    if cu_seqlens is None:
        return _sequence_backward(*tokens, S, dS, scale, l2norm_qk, chunk_size)
    bounds = cu_seqlens.tolist()
    gradients = [tuple(t[:, :0] for t in tokens[1:]) + (S[:0],)]
    for n, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:])):
        part = (t[:, begin:end] for t in tokens)
        gradients.append(_sequence_backward(*part, S[n : n + 1], dS[n : n + 1], scale, l2norm_qk, chunk_size))
    *of_tokens, of_states = zip(*gradients)
    return *(torch.cat(parts, 1) for parts in of_tokens), torch.cat(of_states)


def _sequence_backward(grad_o, q, k, v, g, beta, S, dS, scale, l2norm_qk, chunk_size) -> tuple[Tensor, ...]:
    if v.shape[1] == 0:
        return *(torch.zeros_like(t) for t in (q, k, v, g, beta)), dS
    dO, g_heads = grad_o.transpose(1, 2).split(chunk_size, 2), g.transpose(1, 2).split(chunk_size, 2)
    chunks = chunks_of(*heads_first(q, k, v, g, beta, l2norm_qk), scale, chunk_size)
    states, unscaled_updates = [], []
    for x in chunks:  # forward sweep
        states.append(S)
        unscaled_updates.append(column_inverse(x.kk, x.beta) @ residual(x.v, x.k, x.c, S))  # U'; U = diag(beta) U'
        S = next_state(S, x.k, x.c, x.beta[..., None] * unscaled_updates[-1])
    gradients = []
    for i in reversed(range(len(chunks))):  # reverse sweep
        x, U_ = chunks[i], unscaled_updates[i]
        X = inverse(x.kk, x.beta).mT @ update_gradient(x, dO[i], dS)  # X     = T^T dU
        dV, dbeta = x.beta[..., None] * X, (U_ * X).sum(-1)  # dV    = beta X; dbeta = rowsum(U' ∘ X)
        swept = Swept(x.beta[..., None] * U_, states[i], dV, dS)
        dS = state_gradient(x, dO[i], dV, dS, scale)
        dQ, dK, dg = token_gradients(x, g_heads[i], dO[i], swept, scale)
        gradients.append((dQ, dK, dV, dg, dbeta))
    dq, dk, dv, dg, dbeta = (torch.cat(parts[::-1], 2).transpose(1, 2) for parts in zip(*gradients))
    dq, dk = sum_value_heads(dq, q.shape[2]), sum_value_heads(dk, q.shape[2])
    if l2norm_qk:
        dq, dk = l2norm_gradient(dq, q), l2norm_gradient(dk, k)
    return dq, dk, dv, dg, dbeta, dS
