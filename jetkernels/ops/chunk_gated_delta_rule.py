"""``jet::chunk_gated_delta_rule`` and its backward: prefill and training of the gated delta rule."""

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.plain import chunk_gated_delta_rule as plain


def _state_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((N, v.shape[2], q.shape[3], v.shape[3]), dtype=dtype)


def _fake(q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm_qk):
    return v.new_empty(v.shape), _state_like(q, v, cu_seqlens)


def _fake_backward(grad_o, grad_final_state, q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm_qk):
    return (*(t.new_empty(t.shape) for t in (q, k, v, g, beta)), _state_like(q, v, cu_seqlens))


_register.define(
    "chunk_gated_delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens, float scale, "
    "bool l2norm_qk) -> (Tensor o, Tensor final_state)",
    fake=_fake,
    plain=plain.chunk_gated_delta_rule,
)
_register.define(
    "chunk_gated_delta_rule_backward",
    "(Tensor grad_o, Tensor? grad_final_state, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, "
    "Tensor? initial_state, Tensor? cu_seqlens, float scale, bool l2norm_qk) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor dinitial_state)",
    fake=_fake_backward,
    plain=plain.chunk_gated_delta_rule_backward,
)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.l2norm_qk = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_o, grad_final_state):
    q, k, v, g, beta, initial_state, cu_seqlens = ctx.saved_tensors
    if grad_o is None:
        grad_o = torch.zeros_like(v)
    dq, dk, dv, dg, dbeta, dinitial_state = torch.ops.jet.chunk_gated_delta_rule_backward(
        grad_o, grad_final_state, q, k, v, g, beta, initial_state, cu_seqlens, ctx.scale, ctx.l2norm_qk
    )
    return dq, dk, dv, dg, dbeta, dinitial_state if initial_state is not None else None, None, None, None


_register.differentiate("chunk_gated_delta_rule", backward=_backward, setup_context=_setup_context)
_register.autocast("chunk_gated_delta_rule", low_precision=(0, 1, 2), fp32=(3, 5))


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule over whole sequences, in chunks of 64 tokens. Differentiable in every floating-point input.

    Per sequence and value head, with a state S [K, V] in fp32::

        S <- exp(g_t) S;  u = beta_t (v_t - S^T k_t);  S <- S + k_t u^T;  o_t = scale * S^T q_t

    Args:
        q, k: [B, T, Hk, K], one dtype with v: fp32, bf16 or fp16 (on a CPU also fp64). Value head h reads query/key
            head ``h // (H // Hk)``.
        v: [B, T, H, V], H a multiple of Hk.
        g: [B, T, H], natural-log decay, <= 0; ``-inf`` forgets everything. Any floating dtype, used as fp32.
        beta: [B, T, H], writing strength in [0, 1]. Any floating dtype, used as fp32.
        scale: factor on the output; ``None`` means ``K ** -0.5``.
        initial_state: [N, H, K, V] fp32 (fp64 with fp64 inputs); ``None`` means zeros.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: replace q and k by ``x / sqrt(sum(x^2) + 1e-6)`` per head, in fp32.
        cu_seqlens: [N + 1] int32 or int64 offsets of N packed sequences; then B must be 1. Empty sequences are legal.

    Returns:
        o [B, T, H, V] in v's dtype, and final_state [N, H, K, V] or ``None``.

    Raises:
        RuntimeError: an argument has the wrong rank, size, dtype or device; the message names it.

    Source: Gated Delta Networks (arXiv 2412.06464, section 3); used by JetBlock (arXiv 2508.15884, section 2.3).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, final_state = torch.ops.jet.chunk_gated_delta_rule(
        q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm_in_kernel
    )
    return o, final_state if output_final_state else None
