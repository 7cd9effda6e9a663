"""Chunked gated delta rule and its backward, in plain PyTorch (M chunks in a row, Z = B*H head rows, C tokens).

Everything but the state is one batched GEMM over all chunks; the state takes two GEMMs per chunk. With the chunk-local
cumulative log decay c, Γ_ij = e^{c_i-c_j} for j <= i, kk = tril(K Kᵀ ∘ Γ, -1), P = scale tril(Q Kᵀ ∘ Γ):

    T = (I + diag(beta) kk)^-1      U = T diag(beta) (V - diag(e^c) K S0) = U0 - W S0
    O = scale diag(e^c) Q S0 + P U  S1 = e^{c_C} S0 + (diag(e^{c_C-c}) K)ᵀ U

The backward needs no division: with U' from U = diag(beta) U', U' = V - diag(e^c) K S0 - kk U. The gradient of g_t sums
what passes from before token t to t or later, with Y = tril(dP ∘ Q Kᵀ + dM ∘ K Kᵀ, -1):

    dg_t = Σ_{j<t<=i} Y_ij + Σ_{t<=i} (<q_i, scale e^{c_i} S0 dO_i> - <k_i, e^{c_i} S0 dV_i>) + Σ_{j<t} <k_j, dK_st,j> +
    e^{c_C} <S0,dS1>

Each term has e^{g_t} in it and none cancels another exactly, so that dg keeps its relative accuracy at any decay.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._chunks import CHUNK, chunk_layout
from ._compute import accumulation_dtype, plain_op

# e^-104 is 0 in fp32: decay beyond it forgets everything, and sums of clamped g stay finite (g = -inf is legal)
LOG_DECAY_MIN = -104.0
L2NORM_EPS = 1e-6


def l2norm(x):
    """Normalise: x / sqrt(sum x^2 + eps) over the last dimension, and the reciprocal norm."""
    rnorm = (x.square().sum(-1, keepdim=True) + L2NORM_EPS).rsqrt()
    return x * rnorm, rnorm


def l2norm_backward(grad, normed, rnorm):
    """Gradient of `l2norm` from its outputs."""
    return (grad - normed * (normed * grad).sum(-1, keepdim=True)) * rnorm


def multiply(a, b):
    """Batched a @ b over the leading two dimensions [M,Z]."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def finite(x):
    """Zeros for what is not finite in x."""
    return x.nan_to_num(0, 0, 0)


def multiply_lower(a, b):
    """Batched a @ b for lower-triangular a [M,Z,C,C]: row i has rows 0 .. i of b [M,Z,C,N] in it, and no other.

    A product with the zeros above the diagonal would carry a NaN or an infinity of b to the rows before it. Columns of
    b are apart: in one that has such a number the product is NaN from there on.
    """
    bad = (b - b).nan_to_num_(1)
    before = b.new_full((CHUNK, CHUNK), -1).tril_().expand(bad.shape[0] * bad.shape[1], -1, -1)
    poison = torch.bmm(before, bad.flatten(0, 1)).sqrt_()  # of minus the number of such rows so far: 0 or NaN
    return multiply(a, finite(b)).add_(poison.view_as(b))


def multiply_shared(a, b):
    """Batched a [M,Z,C,C] @ b [M,Zk,C,K] -> [M,Z,C,K]; the Z // Zk value heads that share b[:, zk] are one GEMM."""
    shape = a.shape[:3] + b.shape[3:]
    a = a.reshape(b.shape[0] * b.shape[1], -1, CHUNK)
    return torch.bmm(a, b.flatten(0, 1)).reshape(shape)


class Inputs(NamedTuple):
    """The arguments of the op; those of the backward op after the incoming gradients."""

    q: Tensor  # [B,T,Hk,K]
    k: Tensor  # [B,T,Hk,K]
    v: Tensor  # [B,T,H,V]
    g: Tensor  # [B,T,H]
    beta: Tensor  # [B,T,H]
    initial_state: Tensor | None  # [N,H,K,V]
    cu_seqlens: Tensor | None  # [N+1]
    scale: float
    l2norm_qk: bool


class Heads:
    """Moves tensors between tokens [B,T,H,...] and chunks of head rows [M,Z,C,...] in the dtype of the arithmetic."""

    def __init__(self, q, v, cu_seqlens):
        self.layout = chunk_layout(q.shape[0], q.shape[1], cu_seqlens)
        self.dtype = accumulation_dtype(q)
        self.key_heads, self.heads = q.shape[2], v.shape[2]
        self.groups = self.heads // self.key_heads if self.key_heads else 1
        self.empty = self.layout.count * self.layout.batch * self.heads == 0

    def split(self, x, dtype=None):
        """[B,T,Hx,...] -> contiguous [M,Z,C,...]."""
        chunks = self.layout.split(x).transpose(2, 3)
        return torch.empty(chunks.shape, dtype=dtype or self.dtype, device=x.device).copy_(chunks).flatten(1, 2)

    def join(self, x, heads, dtype):
        """[M,Z,C,...] -> contiguous [B,T,heads,...] in `dtype`."""
        return self.layout.join(x.unflatten(1, (self.layout.batch, heads)).transpose(2, 3), dtype)

    def per_head(self, x):
        """[M,Zk,...] -> [M,Z,...], every query/key head once for each value head that reads it."""
        if self.groups == 1:
            return x
        return x.unsqueeze(2).expand(-1, -1, self.groups, *x.shape[2:]).flatten(1, 2)

    def per_key_head(self, x):
        """[M,Z,...] -> [M,Zk,...], the adjoint of `per_head`."""
        return x if self.groups == 1 else x.unflatten(1, (-1, self.groups)).sum(2)


class Stages:
    """All that does not depend on the state: c, Γ, kk, P, T, U0, W and the scaled copies of q and k, [M,Z,...]."""

    def __init__(self, heads, a):
        self.q, self.k, self.v = heads.split(a.q), heads.split(a.k), heads.split(a.v)
        self.q_rnorm = self.k_rnorm = None
        if a.l2norm_qk:
            self.q, self.q_rnorm = l2norm(self.q)
            self.k, self.k_rnorm = l2norm(self.k)
        self.beta = heads.split(a.beta).unsqueeze(-1)
        g = heads.split(a.g, torch.float64).clamp(min=LOG_DECAY_MIN)
        self._move_nan_to_values(heads, g)
        # c reaches -6656, where fp32 resolves 5e-4: sums and differences in fp64, one rounding before exp
        c = g.cumsum(-1)
        self.decay_in = c.exp().to(heads.dtype).unsqueeze(-1)
        self.decay_out = (c[..., -1:] - c).exp().to(heads.dtype).unsqueeze(-1)
        self.decay = self.decay_in[..., -1:, :]
        causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=g.device).tril()
        difference = (c.unsqueeze(-1) - c.unsqueeze(-2)).to(heads.dtype)
        self.gamma = torch.where(causal, difference, -torch.inf).exp_()

        keys = self.k.transpose(-1, -2)
        self.kk = (heads.per_head(multiply(self.k, keys)) * self.gamma).tril_(-1)
        self.p = (heads.per_head(multiply(self.q, keys)) * self.gamma).mul_(a.scale).tril_()
        self.k_in = heads.per_head(self.k) * self.decay_in
        self.k_out = heads.per_head(self.k) * self.decay_out
        self.q_in = heads.per_head(self.q) * (self.decay_in * a.scale)

        eye = torch.eye(CHUNK, dtype=heads.dtype, device=g.device)
        # T = (I + diag(beta) kk)^-1   [C, C]
        self.t = torch.linalg.solve_triangular(self.kk * self.beta, eye, upper=False, unitriangular=True)
        t_beta = self.t * self.beta.transpose(-1, -2)
        self.u0 = multiply_lower(t_beta, self.v)
        self.w = multiply(t_beta, self.k_in)

    def _move_nan_to_values(self, heads, g):
        """Tokens whose k, g or beta is not finite become NaN in v and harmless in these.

        Such a token makes NaN of the whole state, as NaN in all of v does; elsewhere it would reach the tokens before
        it too.
        """
        of_keys = heads.per_head((self.k - self.k).sum(-1, keepdim=True))
        of_gates = (g - g).to(heads.dtype).unsqueeze(-1) + (self.beta - self.beta)
        self.v += of_keys + of_gates
        self.k, self.beta = finite(self.k), finite(self.beta)
        g.nan_to_num_(0, 0, 0)


def sweep(heads, stages, initial_state, state_shape):
    """The states in chunk order.

    Returns S0 [M,Z,K,V] at the start of every chunk, U [M,Z,C,V] and the final state [N,H,K,V].
    """
    layout, count = heads.layout, heads.layout.count
    rows = stages.v.shape[1]
    states = stages.v.new_empty(count + 1, rows, *state_shape[2:])
    u = torch.empty_like(stages.v)
    if initial_state is None:
        initial = states.new_zeros(state_shape)
    else:
        initial = initial_state.to(heads.dtype)
    if layout.packed:
        final = torch.cat([initial, initial.new_empty(1, *state_shape[1:])])
        states[0].zero_()
    else:
        states[0].copy_(initial.flatten(0, 1))
    for m in range(count):
        if layout.packed:
            begin = initial.index_select(0, layout.seq[m : m + 1])[0]
            states[m].copy_(torch.where(layout.first[m], begin, states[m]))
        # U = U0 - W S0   [C, V]
        torch.baddbmm(stages.u0[m], stages.w[m], states[m], alpha=-1, out=u[m])
        # S1 = e^{c_C} S0 + (diag(e^{c_C-c}) K)ᵀ U   [K, V]
        torch.mul(states[m], stages.decay[m], out=states[m + 1])
        states[m + 1].baddbmm_(stages.k_out[m].transpose(-1, -2), u[m])
        if layout.packed:
            final.index_copy_(0, layout.end_row[m : m + 1], states[m + 1].unsqueeze(0))
    if layout.packed:
        return states[:-1], u, final[:-1].contiguous()
    return states[:-1], u, states[-1].clone().view(state_shape)


def sweep_backward(heads, stages, grad_o, grad_final_state, state_shape):
    """The gradients of the states in reverse chunk order.

    Returns dS1 [M,Z,K,V] at the end of every chunk, dU [M,Z,C,V] and the gradient of the initial state [N,H,K,V].
    """
    layout, count = heads.layout, heads.layout.count
    rows = stages.v.shape[1]
    # dU = Pᵀ dO + diag(e^{c_C-c}) K dS1   [C, V]; the second term follows in the sweep
    du = multiply(stages.p.transpose(-1, -2), grad_o)
    ds1 = stages.v.new_empty(count, rows, *state_shape[2:])
    final = ds1.new_zeros(state_shape) if grad_final_state is None else grad_final_state.to(heads.dtype)
    if layout.packed:
        initial = torch.cat([final, final.new_empty(1, *state_shape[1:])])
        ds = ds1.new_zeros(ds1.shape[1:])
    else:
        ds = final.flatten(0, 1)
    for m in reversed(range(count)):
        if layout.packed:
            end = final.index_select(0, layout.seq[m : m + 1])[0]
            ds = torch.where(layout.last[m], end, ds)
        ds1[m].copy_(ds)
        du[m].baddbmm_(stages.k_out[m], ds1[m])
        # dS0 = e^{c_C} dS1 + (scale diag(e^c) Q)ᵀ dO - Wᵀ dU   [K, V]
        ds = torch.baddbmm(ds1[m] * stages.decay[m], stages.q_in[m].transpose(-1, -2), grad_o[m])
        ds.baddbmm_(stages.w[m].transpose(-1, -2), du[m], alpha=-1)
        if layout.packed:
            initial.index_copy_(0, layout.start_row[m : m + 1], ds.unsqueeze(0))
    if layout.packed:
        return ds1, du, initial[:-1].contiguous()
    return ds1, du, ds.clone().view(state_shape)


def forward(a):
    """jet::chunk_gated_delta_rule of `Inputs`, and the states [M,Z,K,V] at the start of every chunk or None."""
    heads = Heads(a.q, a.v, a.cu_seqlens)
    state_shape = (heads.layout.sequences, heads.heads, a.q.shape[3], a.v.shape[3])
    if heads.empty:
        final = a.v.new_zeros(state_shape, dtype=heads.dtype)
        if a.initial_state is not None:
            final.copy_(a.initial_state)
        return torch.zeros_like(a.v, memory_format=torch.contiguous_format), final, None
    stages = Stages(heads, a)
    states, u, final_state = sweep(heads, stages, a.initial_state, state_shape)
    # O = scale diag(e^c) Q S0 + P U   [C, V]
    o = multiply(stages.q_in, states).add_(multiply_lower(stages.p, u))
    return heads.join(o, heads.heads, a.v.dtype), final_state, states


@plain_op
def chunk_gated_delta_rule(*inputs):
    """jet::chunk_gated_delta_rule.

    The fields of `Inputs` -> o [B,T,H,V] in v's dtype, final_state [N,H,K,V] in fp32 (fp64 if q is fp64).
    """
    return forward(Inputs(*inputs))[:2]


def gate_gradients(y, read, stored, through):
    """Gradient dg [M,Z,C] from the terms of the module's text: y [M,Z,C,C], read, stored [M,Z,C], through [M,Z]."""
    # sums in fp64, so that those of 64 add no error
    below = y.flip(-2).cumsum(-2).flip(-2)
    passing = below.tril_(-1).sum(-1, dtype=torch.float64)
    read = read.double().flip(-1).cumsum(-1).flip(-1)
    stored = torch.nn.functional.pad(stored.double()[..., :-1], (1, 0)).cumsum(-1)
    return passing + read + stored + through.double().unsqueeze(-1)


def chunk_gradients(heads, stages, states, u, grad_o, ds1, du, scale):
    """Gradients within the chunks, [M,Z,C,...]: of normed q and k for every value head, v, beta and g."""
    x = multiply(stages.t.transpose(-1, -2), du)
    dv = stages.beta * x
    # U' = V - diag(e^c) K S0 - kk U, with NaN where U has it and not in the rows before   [C, V]
    u_prime = stages.v - multiply(stages.k_in, states)
    u_prime.flatten(0, 1).baddbmm_(stages.kk.flatten(0, 1), finite(u).flatten(0, 1), alpha=-1)
    u_prime.add_(u - u)
    dbeta = (u_prime * x).sum(-1)

    # dP = scale tril(dO Uᵀ) ∘ Γ,  dM = -tril(dV Uᵀ, -1) ∘ Γ,  Y   [C, C]
    dp = multiply(grad_o, u.transpose(-1, -2))
    dm = multiply(dv, u.transpose(-1, -2)).neg_()
    y = (dp * stages.p).addcmul_(dm, stages.kk).tril_(-1)
    dp.mul_(stages.gamma).mul_(scale).tril_()
    dm.mul_(stages.gamma).tril_(-1)
    # What is read from and stored in the state   [C, K]
    dq_state = multiply(grad_o, states.transpose(-1, -2)).mul_(stages.decay_in * scale)
    dk_read = multiply(dv, states.transpose(-1, -2)).mul_(stages.decay_in)
    dk_state = multiply(u, ds1.transpose(-1, -2)).mul_(stages.decay_out)
    q, k = heads.per_head(stages.q), heads.per_head(stages.k)
    read, stored = (q * dq_state).sum(-1) - (k * dk_read).sum(-1), (k * dk_state).sum(-1)
    dg = gate_gradients(y, read, stored, (states * ds1).sum((-1, -2)) * stages.decay[..., 0, 0])

    # dQ = scale diag(e^c) dO S0ᵀ + dP K   [C, K]
    dq = multiply_shared(dp, stages.k).add_(dq_state)
    # dK as row of kk, as column of kk and P, and as what the state stores   [C, K]
    dk = multiply_shared(dm, stages.k).sub_(dk_read).add_(dk_state)
    dk.add_(multiply_shared(dp.transpose(-1, -2), stages.q)).add_(multiply_shared(dm.transpose(-1, -2), stages.k))
    return dq, dk, dv, dbeta, dg


@plain_op
def chunk_gated_delta_rule_backward(grad_o, grad_final_state, *inputs):
    """jet::chunk_gated_delta_rule_backward.

    grad_o [B,T,H,V], grad_final_state [N,H,K,V] or None, then the fields of `Inputs`
    -> gradients of q, k, v, g, beta and initial_state, each in the shape and dtype of what it belongs to
    (initial_state = None: [N,H,K,V] in fp32, fp64 if q is fp64).
    """
    a = Inputs(*inputs)
    heads = Heads(a.q, a.v, a.cu_seqlens)
    state_shape = (heads.layout.sequences, heads.heads, a.q.shape[3], a.v.shape[3])
    state_dtype = heads.dtype if a.initial_state is None else a.initial_state.dtype
    if heads.empty:
        dinitial = a.v.new_zeros(state_shape, dtype=state_dtype)
        if grad_final_state is not None:
            dinitial.copy_(grad_final_state)
        tokens = inputs[: Inputs._fields.index("initial_state")]
        return *(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in tokens), dinitial
    stages = Stages(heads, a)
    states, u, _ = sweep(heads, stages, a.initial_state, state_shape)
    do = heads.split(grad_o)
    ds1, du, dinitial = sweep_backward(heads, stages, do, grad_final_state, state_shape)
    dq, dk, dv, dbeta, dg = chunk_gradients(heads, stages, states, u, do, ds1, du, a.scale)

    dq, dk = heads.per_key_head(dq), heads.per_key_head(dk)
    if a.l2norm_qk:
        dq = l2norm_backward(dq, stages.q, stages.q_rnorm)
        dk = l2norm_backward(dk, stages.k, stages.k_rnorm)
    dg = torch.where(a.g < LOG_DECAY_MIN, 0, heads.join(dg, heads.heads, a.g.dtype))
    return (
        heads.join(dq, heads.key_heads, a.q.dtype),
        heads.join(dk, heads.key_heads, a.k.dtype),
        heads.join(dv, heads.heads, a.v.dtype),
        dg,
        heads.join(dbeta, heads.heads, a.beta.dtype),
        dinitial.to(state_dtype),
    )
