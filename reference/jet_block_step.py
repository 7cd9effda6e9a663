"""All of a JetBlock's decode step between its input and its output projections, with pools of both states."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.delta_gates import delta_gates
from reference.dynamic_conv_step import dynamic_conv_step
from reference.gated_rms_norm import gated_rms_norm
from reference.recurrent_gated_delta_rule import recurrent_gated_delta_rule


def jet_block_step(
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
    state_indices: Tensor | None,
    scale: float,
    eps: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """``jet::jet_block_step`` out of place: the definitions of its parts, one after the other.

    silu(hidden) and the output of the convolution have the precision of ``hidden`` and ``v``: that is part of the
    definition. All else is computed in ``dtype``.

    Args:
        q: [N, H, K], as the projection gives it, before SiLU.
        k: [N, H, K], likewise.
        v: [N, H * V], before the convolution.
        hidden: [N, R], before SiLU.
        a: [N, H], of the decay.
        b: [N, H], of the write strength.
        gate: [N, H, V], before SiLU.
        weight: [H * V * W, R], of the generator.
        bias: [H * V * W] or ``None``.
        A_log: [H].
        dt_bias: [H].
        norm_weight: [V].
        conv_state: [P, H * V, W - 1] pool.
        state: [P, H, K, V] pool.
        state_indices: [N] rows of both pools or ``None`` for row n; a negative index touches no state and gives a zero
            output.
        scale: factor on the output of the delta rule.
        eps: of the norm.
        dtype: of the arithmetic, and of what is returned.

    Returns:
        y [N, H * V], and the pools after the call, in ``dtype``.
    """
    q, k = (F.silu(t.to(dtype)) for t in (q, k))
    hidden = F.silu(hidden.to(dtype)).to(hidden.dtype)
    convolved, conv_state = dynamic_conv_step(v, hidden, weight, bias, conv_state, state_indices, True, dtype)
    v = convolved.to(v.dtype).to(dtype)
    g, beta = delta_gates(a, b, A_log, dt_bias, dtype)
    tokens = (q, k, v.unflatten(-1, (q.shape[1], -1)), g, beta)
    o, state = recurrent_gated_delta_rule(
        *(t.unsqueeze(1) for t in tokens), state, state_indices, scale, l2norm_qk=True, dtype=dtype
    )
    y = gated_rms_norm(o[:, 0], gate, norm_weight, eps, dtype)
    if state_indices is not None:
        y = torch.where(state_indices.view(-1, 1, 1) < 0, 0, y)
    return y.flatten(1), conv_state, state
