"""JetBlock as a function of its published parameters.

Source: JetBlock (arXiv 2508.15884, section 2.3).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.delta_gates import delta_gates
from reference.dynamic_conv import dynamic_conv
from reference.gated_rms_norm import gated_rms_norm
from reference.recurrent_gated_delta_rule import gated_delta_rule


def jet_block(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    conv_state: Tensor | None = None,
    recurrent_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    norm_eps: float = 1e-5,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """One JetBlock.

    Args:
        x: [B, T, C], the layer input.
        parameters: ``{q,k,v,g,o,a,b}_proj.weight``, ``A_log`` [H], ``dt_bias`` [H], ``o_norm.weight`` [V] and
            ``dynamic_conv1d.kernel_generator.{w1.weight [R, C], w2.weight [D*W, R], w2.bias [D*W]}``; these shapes say
            how large H, K, V and W are.
        conv_state: [N, D, W - 1], or ``None`` for zeros.
        recurrent_state: [N, H, K, V], or ``None`` for zeros.
        cu_seqlens: [N + 1] bounds of packed sequences (B = 1) or ``None``.
        norm_eps: epsilon of the RMSNorm over V.
        dtype: what everything is computed in, and what is returned.

    Returns:
        y [B, T, C], conv_state_out [N, D, W - 1] and recurrent_state_out [N, H, K, V], in ``dtype``.
    """
    w = {name: value.to(dtype) for name, value in parameters.items()}
    x = x.to(dtype)
    H = w["A_log"].shape[0]

    def project(name: str) -> Tensor:
        return x @ w[f"{name}_proj.weight"].mT

    q = F.silu(project("q")).unflatten(-1, (H, -1))  # q = silu(q_proj(x))
    k = F.silu(project("k")).unflatten(-1, (H, -1))  # k = silu(k_proj(x))
    generator = "dynamic_conv1d.kernel_generator."
    hidden = F.silu(x @ w[generator + "w1.weight"].mT)  # hidden = silu(w1 x)
    v, conv_state = dynamic_conv(  # v = dynamic_conv(v_proj(x), ..)
        project("v"), hidden, w[generator + "w2.weight"], w[generator + "w2.bias"], conv_state, cu_seqlens, True, dtype
    )
    # g = -exp(A_log) softplus(a_proj(x) + dt_bias), beta = sigmoid(b_proj(x))
    g, beta = delta_gates(project("a"), project("b"), w["A_log"], w["dt_bias"], dtype)
    o, recurrent_state = gated_delta_rule(
        q, k, v.unflatten(-1, (H, -1)), g, beta, recurrent_state, cu_seqlens, q.shape[-1] ** -0.5, True, dtype
    )
    gate = project("g").unflatten(-1, (H, -1))
    o = gated_rms_norm(o, gate, w["o_norm.weight"], norm_eps, dtype)  # o = rmsnorm(o) silu(g_proj(x))
    return o.flatten(-2) @ w["o_proj.weight"].mT, conv_state, recurrent_state  # y = o_proj(o)
