"""``jet::chunk_gated_delta_rule`` and its backward: prefill and training of the gated delta rule."""

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import Checks, real_dtype
from jetkernels.plain import chunk_gated_delta_rule as plain


def _new_state(checks: Checks, q: Tensor) -> Tensor:
    return q.new_empty([checks.size[symbol] for symbol in ("N", "H", "K", "V")], dtype=real_dtype(q))


def _check(checks, q, k, v, g, beta, initial_state, cu_seqlens):
    checks.tokens("B", q, k, v, g, beta)
    checks.sequences(cu_seqlens, "q", q)
    checks.state("initial_state", initial_state, q)


def _fake(checks, q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm_qk):
    _check(checks, q, k, v, g, beta, initial_state, cu_seqlens)
    return v.new_empty(v.shape), _new_state(checks, q)


def _fake_backward(checks, grad_o, grad_final_state, q, k, v, g, beta, initial_state, cu_seqlens, scale, l2norm_qk):
    _check(checks, q, k, v, g, beta, initial_state, cu_seqlens)
    checks.shape("grad_o", grad_o, "B", "T", "H", "V")
    checks.like("grad_o", grad_o, "q", q)
    checks.state("grad_final_state", grad_final_state, q)
    return (*(t.new_empty(t.shape) for t in (q, k, v, g, beta)), _new_state(checks, q))


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
_op = torch.ops.jet.chunk_gated_delta_rule.default


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
    """Gated delta rule over whole sequences, in chunks of 64 tokens.

    Differentiable in every floating-point input, once and in reverse mode; a second derivative and forward mode raise.

    Per sequence and value head, with a state S [K, V] in fp32::

        S <- exp(g_t) S;  u = beta_t (v_t - S^T k_t);  S <- S + k_t u^T;  o_t = scale * S^T q_t

    Args:
        q, k: [B, T, Hk, K], one dtype with v: fp32, bf16 or fp16 (on a CPU also fp64). Value head h reads query/key
            head ``h // (H // Hk)``.
        v: [B, T, H, V], H a multiple of Hk.
        g: [B, T, H], natural-log decay, <= 0; ``-inf`` forgets everything. Any floating dtype, used as fp32. A number
            above 0 is refused on a CPU, and on CUDA under ``JETKERNELS_CHECK=1``; elsewhere nothing looks, and what
            such a token and those after it give is not defined.
        beta: [B, T, H], writing strength in [0, 1]. Any floating dtype, used as fp32.
        scale: factor on the output; ``None`` means ``K ** -0.5``.
        initial_state: [N, H, K, V] fp32 (fp64 with fp64 inputs); ``None`` means zeros.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: replace q and k by ``x / sqrt(sum(x^2) + 1e-6)`` per head, in fp32.
        cu_seqlens: [N + 1] int32 or int64 offsets of N packed sequences; then B must be 1. Empty sequences are legal.

    Returns:
        o [B, T, H, V] in v's dtype, and final_state [N, H, K, V] or ``None``.

    Raises:
        RuntimeError: an argument has the wrong rank, size, dtype or device, or g is above 0; the message names it.
        TypeError: an argument is not a tensor, number or flag as above.
        RuntimeError, NotImplementedError: a second derivative is asked for; an input has a tangent (forward mode).

    Source: Gated Delta Networks (arXiv 2412.06464, section 3); used by JetBlock (arXiv 2508.15884, section 2.3).
    """
    scale = _register.default_scale(q) if scale is None else scale
    try:
        o, final_state = _op(q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm_in_kernel)
    except RuntimeError as error:
        raise _register.refusal(error, "chunk_gated_delta_rule") from None
    return o, final_state if output_final_state else None
