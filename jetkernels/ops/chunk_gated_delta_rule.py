"""``jet::chunk_gated_delta_rule`` and its backward: prefill and training of the gated delta rule."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops import _gated_arguments, _register
from jetkernels.ops._checks import Checks, real_dtype
from jetkernels.plain import chunk_gated_delta_rule as plain


def _check(checks: Checks, a: Any) -> None:
    checks.tokens("B", a)
    checks.sequences(a.cu_seqlens, "q", a.q)
    checks.state("initial_state", a.initial_state, a.q)


def _new_state(checks: Checks, a: Any) -> Tensor:
    return checks.empty(a.q, "N", "H", "K", "V", dtype=real_dtype(a.q))


def _fake(checks: Checks, a: Any) -> tuple[Tensor, ...]:
    _check(checks, a)
    return a.v.new_empty(a.v.shape), _new_state(checks, a)


def _fake_backward(checks: Checks, a: Any) -> tuple[Tensor, ...]:
    _check(checks, a)
    checks.shape("grad_o", a.grad_o, "B", "T", "H", "V")
    checks.like("grad_o", a.grad_o, "q", a.q)
    checks.state("grad_final_state", a.grad_final_state, a.q)
    return *(t.new_empty(t.shape) for t in (a.q, a.k, a.v, a.g, a.beta)), _new_state(checks, a)


_register.define(
    "chunk_gated_delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens, float scale, "
    "bool l2norm_qk) -> (Tensor o, Tensor final_state)",
    fake=_fake,
    plain=plain.chunk_gated_delta_rule,
)
_register.define_backward(
    "chunk_gated_delta_rule",
    constant=("cu_seqlens",),
    fake=_fake_backward,
    plain=plain.chunk_gated_delta_rule_backward,
)
_register.autocast("chunk_gated_delta_rule", low_precision=("q", "k", "v"), fp32=("g", "initial_state"))
_op = torch.ops.jet.chunk_gated_delta_rule.default


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    *,
    state_v_first: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    chunk_size: int = 64,
    autotune_interval: int | None = None,
    use_cache: bool | None = None,
    transpose_state_layout: bool | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    cp_context: object | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule over whole sequences, in chunks of at most 64 tokens.

    The arguments are those of flash-linear-attention 0.6, by their names there. Differentiable in every floating-point
    input, once and in reverse mode; a second derivative and forward mode raise.

    Per sequence and value head, with a state S [K, V] in fp32 (fp64 with fp64 inputs)::

        S <- exp(g_t) S;  u = beta_t (v_t - S^T k_t);  S <- S + k_t u^T;  o_t = scale * S^T q_t

    Args:
        q: [B, T, Hk, K], one dtype with k and v: fp32, bf16, fp16 or fp64. Value head h reads query/key head
            ``h // (H // Hk)``.
        k: [B, T, Hk, K].
        v: [B, T, H, V], H a multiple of Hk.
        g: [B, T, H], natural-log decay, <= 0; ``-inf`` forgets everything. Any floating dtype, used as fp32 (fp64 with
            fp64 inputs). A number above 0 is refused on a CPU, and on CUDA under ``JETKERNELS_CHECK=1``; elsewhere
            nothing looks, and what such a token and those after it give is not defined. ``None`` means 0, no decay.
        beta: [B, T, H], writing strength in [0, 1]; up to 2 gives S negative eigenvalues, beyond that it may grow
            without bound. Any floating dtype, used as g. ``None`` means 1.
        scale: factor on the output; ``None`` means ``K ** -0.5``.
        initial_state: [N, H, K, V] fp32 (fp64 with fp64 inputs), or bf16 or fp16, which are cast; ``None`` means zeros.
        output_final_state: whether to return the state after the last token.
        use_qk_l2norm_in_kernel: replace q and k by ``x / sqrt(sum(x^2) + 1e-6)`` per head, in the state's dtype.
        cu_seqlens: [N + 1] int32 or int64 offsets of N packed sequences; then B must be 1. Empty sequences are legal.
        state_v_first: initial_state and final_state are [N, H, V, K]. The final state is a transposed view.
        use_gate_in_kernel: g is raw, of any sign: the decay is ``-exp(A_log) * softplus(g + dt_bias)``
            (:func:`delta_gates`).
        A_log: [H], any floating dtype, used as g; needed with use_gate_in_kernel and refused without.
        dt_bias: [H], as A_log; ``None`` means 0.
        use_beta_sigmoid_in_kernel: beta is raw: the writing strength is ``sigmoid(beta)``.
        allow_neg_eigval: with use_beta_sigmoid_in_kernel, which it needs, the writing strength is ``2 sigmoid(beta)``.
        cu_seqlens_cpu: cu_seqlens on the CPU. Like the next four it is checked and changes nothing.
        chunk_indices: [chunks, 2] int32 or int64, the chunks of packed sequences.
        chunk_size: 16, 32 or 64, of flash-linear-attention's kernels.
        autotune_interval: at least 1, or ``None``; of the convolution of the published Jet-Nemotron files.
        use_cache: a flag or ``None``; transformers' models hand it on.
        transpose_state_layout: the old name of state_v_first.
        gk: must be ``None``, as the decay is one number per token and head.
        gv: likewise.
        cp_context: must be ``None``, as sequences are not split over devices in here.

    Returns:
        o [B, T, H, V] in v's dtype, and final_state [N, H, K, V] in fp32 (fp64 with fp64 inputs) or ``None``.

    Raises:
        RuntimeError: an argument has the wrong rank, size, dtype or device, or g is above 0; the message names it.
        TypeError: an argument is not a tensor, number or flag as above.
        ValueError: an option has a value that does not exist, or lacks the other that it needs.
        NotImplementedError: gk, gv or cp_context is given.
        RuntimeError, NotImplementedError: a second derivative is asked for; an input has a tangent (forward mode).

    Source: Gated Delta Networks (arXiv 2412.06464, section 3); used by JetBlock (arXiv 2508.15884, section 2.3).
    """
    given = (
        state_v_first,
        use_gate_in_kernel,
        A_log,
        dt_bias,
        use_beta_sigmoid_in_kernel,
        allow_neg_eigval,
        cu_seqlens_cpu,
        chunk_indices,
        chunk_size,
        autotune_interval,
        use_cache,
        transpose_state_layout,
        gk,
        gv,
        cp_context,
    )
    tokens: _gated_arguments.Unchecked = (q, k, v, g, beta)
    v_first = False
    if not _gated_arguments.is_plain(g, beta, initial_state, given):
        tokens, initial_state, v_first = _gated_arguments.resolve(
            "chunk_gated_delta_rule", tokens, initial_state, cu_seqlens, given
        )
    scale = _register.default_scale(q) if scale is None else scale
    try:
        o, final_state = _op(*tokens, initial_state, cu_seqlens, scale, use_qk_l2norm_in_kernel)
    except RuntimeError as error:
        raise _register.refusal(error, "chunk_gated_delta_rule") from None
    if not output_final_state:
        return o, None
    return o, final_state.mT if v_first else final_state
