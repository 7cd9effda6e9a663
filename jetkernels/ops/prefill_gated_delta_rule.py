"""``jet::prefill_gated_delta_rule``: the chunked gated delta rule on a pool of states, which is updated in place."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops import _gated_arguments, _register
from jetkernels.ops._checks import Checks
from jetkernels.plain import prefill_gated_delta_rule as plain


def _fake(checks: Checks, a: Any) -> Tensor:
    checks.tokens("B", a)
    if a.cu_seqlens is None:
        checks.fail("cu_seqlens must be a Tensor, got None")
    checks.sequences(a.cu_seqlens, "q", a.q)
    checks.pool(a, "q", a.q)
    if a.has_initial_state is not None:
        checks.shape("has_initial_state", a.has_initial_state, "N")
        checks.dtype("has_initial_state", a.has_initial_state, torch.bool)
        checks.device("has_initial_state", a.has_initial_state, "q", a.q)
    if (a.mark_tokens is None) != (a.mark_indices is None):
        given = "mark_tokens" if a.mark_indices is None else "mark_indices"
        checks.fail(f"mark_tokens and mark_indices go together, got only {given}")
    if a.mark_tokens is not None:
        checks.index("mark_tokens", a.mark_tokens, "q", a.q, "M")
        checks.index("mark_indices", a.mark_indices, "q", a.q, "M")
    checks.written("state", a.state)
    return a.v.new_empty(a.v.shape)


_register.define(
    "prefill_gated_delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, Tensor? state_indices, Tensor cu_seqlens, "
    "Tensor? has_initial_state, Tensor? mark_tokens, Tensor? mark_indices, float scale, bool l2norm_qk) -> Tensor",
    fake=_fake,
    plain=plain.prefill_gated_delta_rule,
)
_register.in_place("prefill_gated_delta_rule", instead="chunk_gated_delta_rule")
_register.autocast("prefill_gated_delta_rule", low_precision=("q", "k", "v"), fp32=("g",))
_op = torch.ops.jet.prefill_gated_delta_rule.default


def prefill_gated_delta_rule_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    cu_seqlens: Tensor,
    state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    mark_tokens: Tensor | None = None,
    mark_indices: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
) -> Tensor:
    """Gated delta rule over packed sequences whose states are rows of a pool, updated in place.

    The prefill of an engine, under ``torch.no_grad()``: not differentiable. It computes what
    :func:`chunk_gated_delta_rule` does.

    Args:
        q: [1, T, Hk, K], one dtype with k and v.
        k: [1, T, Hk, K].
        v: [1, T, H, V].
        g: [1, T, H], as in :func:`chunk_gated_delta_rule`, but never ``None``, like beta.
        beta: [1, T, H], as in :func:`chunk_gated_delta_rule`.
        state: [P, H, K, V] pool of states, as in :func:`recurrent_gated_delta_rule_`. A pool [P, H, V, K] goes in as
            ``pool.mT``.
        cu_seqlens: [N + 1] int32 or int64, the offsets of the N sequences. Empty sequences are legal.
        state_indices: [N] int32 or int64, the pool row of each sequence; a negative index touches no state, leaves out
            the sequence's marks and gives zeros. ``None`` means row n for sequence n.
        has_initial_state: [N] bool; a sequence without one begins with zeros, whatever is in its row. ``None`` means
            that all have one.
        mark_tokens: [M] int32 or int64, numbers of tokens of the packed row: the states after them are kept, as an
            engine does for prompts that begin alike. Each is a multiple of 64 tokens behind the beginning of its
            sequence, or the end of it.
        mark_indices: [M] int32 or int64, the pool row of each mark, which no sequence and no other mark has; negative:
            the mark is left out.
        scale: factor on the output; ``None`` means ``K ** -0.5``.
        use_qk_l2norm_in_kernel: l2-normalise q and k first, as in :func:`chunk_gated_delta_rule`.
        use_gate_in_kernel: g is raw, as in :func:`chunk_gated_delta_rule`, like the next four.
        A_log: [H].
        dt_bias: [H].
        use_beta_sigmoid_in_kernel: beta is raw.
        allow_neg_eigval: the writing strength is twice as much.

    Returns:
        o [1, T, H, V] in v's dtype.

    Raises:
        RuntimeError: as :func:`chunk_gated_delta_rule` and :func:`recurrent_gated_delta_rule_`; also for a mark that is
            none, or is named twice (checked on a CPU, and on CUDA under ``JETKERNELS_CHECK=1``; elsewhere a mark that
            is none is left out, and of two of one token one or both are kept). The pool is untouched then.
        TypeError, ValueError: an argument of the raw gates is wrong.
        NotImplementedError: an input has a tangent (forward mode).
    """
    tokens: _gated_arguments.Unchecked = (q, k, v, g, beta)
    if not (use_gate_in_kernel is use_beta_sigmoid_in_kernel is allow_neg_eigval is False and A_log is dt_bias is None):
        tokens = _gated_arguments.resolve_gates(
            "prefill_gated_delta_rule_",
            tokens,
            use_gate_in_kernel=use_gate_in_kernel,
            A_log=A_log,
            dt_bias=dt_bias,
            use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
            allow_neg_eigval=allow_neg_eigval,
        )
    scale = _register.default_scale(q) if scale is None else scale
    try:
        return _op(
            *tokens,
            state,
            state_indices,
            cu_seqlens,
            has_initial_state,
            mark_tokens,
            mark_indices,
            scale,
            use_qk_l2norm_in_kernel,
        )
    except RuntimeError as error:
        raise _register.refusal(error, "prefill_gated_delta_rule_") from None
