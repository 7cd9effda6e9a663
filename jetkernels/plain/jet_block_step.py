"""A JetBlock's decode step between its projections: the plain steps one after the other."""

import torch.nn.functional as F

from ._compute import accumulation_dtype, contiguous_as, plain_op
from ._pool import PoolRows
from .dynamic_conv_step import dynamic_conv_step
from .recurrent_gated_delta_rule import recurrent_gated_delta_rule


@plain_op
def jet_block_step(
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
):
    """jet::jet_block_step.

    q, k [N,H,K], v [N,D], hidden [N,R], a, b [N,H], gate [N,H,V] before their activations, weight [D*W,R], bias [D*W]
    or None, A_log, dt_bias [H], norm_weight [V], conv_state [P,D,W-1] and state [P,H,K,V] updated in place,
    state_indices [N] or None -> y [N,D] in q's dtype; zeros where the index is negative, and no state changes for it.
    """
    wide = accumulation_dtype(q)
    q, k, hidden, a, b, gate, A_log, dt_bias, norm_weight = (
        t.to(wide) for t in (q, k, hidden, a, b, gate, A_log, dt_bias, norm_weight)
    )
    v = dynamic_conv_step(v, F.silu(hidden), weight, bias, conv_state, state_indices, True)
    g = -A_log.exp() * F.softplus(a + dt_bias)
    tokens = (F.silu(q), F.silu(k), v.to(wide).unflatten(-1, gate.shape[1:]), g, b.sigmoid())
    o = recurrent_gated_delta_rule(*(t.unsqueeze(1) for t in tokens), state, state_indices, scale, True)
    y = F.rms_norm(o.squeeze(1), norm_weight.shape, norm_weight, eps) * F.silu(gate)
    y = PoolRows(state, state_indices, q.shape[0]).mask(y)
    return contiguous_as(y.flatten(1), v.dtype)
