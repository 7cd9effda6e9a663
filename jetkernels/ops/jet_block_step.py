"""``jet::jet_block_step``: all of a JetBlock's decode step between its projections, both states updated in place."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import Checks
from jetkernels.plain import jet_block_step as plain


def _fake(checks: Checks, a: Any) -> Tensor:
    def like_q(name: str, t: Tensor, *dims: str) -> None:
        checks.shape(name, t, *dims)
        checks.like(name, t, "q", a.q)

    checks.shape("q", a.q, "N", "H", "K")
    checks.floating("q", a.q)
    like_q("k", a.k, "N", "H", "K")
    like_q("v", a.v, "N", "D")
    checks.shape("hidden", a.hidden, "N", "R")
    checks.generator(a, "v")
    like_q("a", a.a, "N", "H")
    like_q("b", a.b, "N", "H")
    like_q("gate", a.gate, "N", "H", "V")
    H, K, V, D = (checks.size[symbol] for symbol in ("H", "K", "V", "D"))
    checks.require(K >= 1, f"q dimension 2 (K) must be at least 1, got {K}")
    checks.require(D == H * V, f"v dimension 1 (D) must be H*V = {H}*{V} (as in gate), got {D}")
    checks.parameter("A_log", a.A_log, "H", a.q)
    checks.parameter("dt_bias", a.dt_bias, "H", a.q)
    checks.parameter("norm_weight", a.norm_weight, "V", a.q)
    like_q("conv_state", a.conv_state, "P", "D", "W-1")
    checks.pool(a, "q", a.q)
    checks.written("conv_state", a.conv_state)
    checks.written("state", a.state)
    return a.v.new_empty(a.v.shape)


_register.define(
    "jet_block_step",
    "(Tensor q, Tensor k, Tensor v, Tensor hidden, Tensor a, Tensor b, Tensor gate, Tensor weight, Tensor? bias, "
    "Tensor A_log, Tensor dt_bias, Tensor norm_weight, Tensor(a!) conv_state, Tensor(b!) state, "
    "Tensor? state_indices, float scale, float eps) -> Tensor",
    fake=_fake,
    plain=plain.jet_block_step,
)
_register.in_place("jet_block_step", instead="the ops that it consists of")
_register.autocast(
    "jet_block_step",
    low_precision=("q", "k", "v", "hidden", "a", "b", "gate", "weight", "bias"),
    fp32=("A_log", "dt_bias", "norm_weight"),
    dtype_of="conv_state",
)
_op = torch.ops.jet.jet_block_step.default


def jet_block_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    a: Tensor,
    b: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    state: Tensor,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """One token per sequence through a JetBlock, from what its input projections give to what its output one takes.

    ::

        v = dynamic convolution step of v, taps from silu(hidden), with SiLU
        g = -exp(A_log) softplus(a + dt_bias);  beta = sigmoid(b)
        o = gated delta rule of l2norm(silu(q)), l2norm(silu(k)), v, g, beta
        y = rmsnorm(o) norm_weight silu(gate)

    The same as :func:`dynamic_conv_step_`, :func:`recurrent_gated_delta_rule_` and the elementwise functions around
    them, but what lies between is rounded less often. For decode, under ``torch.no_grad()``: not differentiable.

    Args:
        q: [N, H, K], before SiLU. All activations may be views of one projection's rows.
        k: [N, H, K], before SiLU.
        v: [N, H * V], before the convolution.
        hidden: [N, R], before SiLU.
        a: [N, H].
        b: [N, H].
        gate: [N, H, V], before SiLU.
        weight: [H * V * W, R], the generator's last layer, in the dtype of q.
        bias: [H * V * W] or ``None``.
        A_log: [H], in fp32 or the dtype of q (fp64 with fp64 inputs), as are dt_bias and norm_weight.
        dt_bias: [H].
        norm_weight: [V].
        conv_state: [P, H * V, W - 1] pool in the dtype of q, oldest input first.
        state: [P, H, K, V] pool, fp32 or bf16 (fp64 with fp64 inputs).
        state_indices: [N] int32 or int64, the row of each sequence in both pools; a negative index touches no state
            and gives a zero output row. ``None`` means row n for sequence n.
        scale: factor on the delta rule's output; ``None`` means ``K ** -0.5``.
        eps: of the norm.

    Returns:
        y [N, H * V] in the dtype of q.

    Raises:
        RuntimeError: a shape, dtype, device or index is wrong, or a pool overlaps itself or another argument: as
            :func:`dynamic_conv_step_` and :func:`recurrent_gated_delta_rule_`. Both pools are untouched then. With
            gradients on, an input that requires one: the op writes in place and is not differentiable.
        NotImplementedError: an input has a tangent (forward mode).
    """
    scale = _register.default_scale(q) if scale is None else scale
    try:
        return _op(
            q,
            k,
            v,
            hidden,
            a,
            b,
            gate,
            weight,
            bias,
            A_log,
            dt_bias,
            norm_weight,
            conv_state,
            state,
            state_indices,
            scale,
            eps,
        )
    except RuntimeError as error:
        raise _register.refusal(error, "jet_block_step_") from None
