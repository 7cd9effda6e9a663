"""``jet::recurrent_gated_delta_rule``: decode, token by token, the state pool updated in place."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from jetkernels.ops import _gated_arguments, _register
from jetkernels.ops._checks import Checks, real_dtype
from jetkernels.ops.chunk_gated_delta_rule import chunk_gated_delta_rule
from jetkernels.plain import recurrent_gated_delta_rule as plain


def _fake(checks: Checks, a: Any) -> Tensor:
    checks.tokens("N", a)
    checks.pool(a, "q", a.q)
    checks.written("state", a.state)
    return a.v.new_empty(a.v.shape)


_register.define(
    "recurrent_gated_delta_rule",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, Tensor? state_indices, float scale, "
    "bool l2norm_qk) -> Tensor",
    fake=_fake,
    plain=plain.recurrent_gated_delta_rule,
)
_register.in_place("recurrent_gated_delta_rule", instead="chunk_gated_delta_rule or fused_recurrent_gated_delta_rule")
_register.autocast("recurrent_gated_delta_rule", low_precision=("q", "k", "v"), fp32=("g",))
_op = torch.ops.jet.recurrent_gated_delta_rule.default


def recurrent_gated_delta_rule_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    *,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
) -> Tensor:
    """Gated delta rule token by token, updating ``state`` in place.

    For decode, under ``torch.no_grad()``: not differentiable.

    Args:
        q: [N, T, Hk, K], any T >= 0; one dtype with k and v.
        k: [N, T, Hk, K].
        v: [N, T, H, V].
        g: [N, T, H], as in :func:`chunk_gated_delta_rule`, but never ``None``, like beta.
        beta: [N, T, H], as in :func:`chunk_gated_delta_rule`.
        state: [P, H, K, V] pool of states, fp32 or bf16 (fp64 with fp64 inputs); any strides without
            overlap, so that a pool [P, H, V, K] goes in as ``pool.mT``. Arithmetic is fp32 (fp64 with fp64 inputs).
        state_indices: [N] int32 or int64, the pool row of each sequence; a negative index touches no state and gives
            a zero output row. ``None`` means row n for sequence n.
        scale: factor on the output; ``None`` means ``K ** -0.5``.
        use_qk_l2norm_in_kernel: l2-normalise q and k first, as in :func:`chunk_gated_delta_rule`.
        use_gate_in_kernel: g is raw, as in :func:`chunk_gated_delta_rule`, like the next four.
        A_log: [H].
        dt_bias: [H].
        use_beta_sigmoid_in_kernel: beta is raw.
        allow_neg_eigval: the writing strength is twice as much.

    Returns:
        o [N, T, H, V] in v's dtype.

    Raises:
        RuntimeError: as :func:`chunk_gated_delta_rule`; also for an index out of range or named twice (checked on a
            CPU, and on CUDA under ``JETKERNELS_CHECK=1``); the pool overlaps itself or another argument. The pool is
            untouched then. With gradients on, an input that requires one: the op writes in place and is not
            differentiable.
        TypeError, ValueError: an argument of the raw gates is wrong.
        NotImplementedError: an input has a tangent (forward mode).
    """
    tokens: _gated_arguments.Unchecked = (q, k, v, g, beta)
    if not (use_gate_in_kernel is use_beta_sigmoid_in_kernel is allow_neg_eigval is False and A_log is dt_bias is None):
        tokens = _gated_arguments.resolve_gates(
            "recurrent_gated_delta_rule_",
            tokens,
            use_gate_in_kernel=use_gate_in_kernel,
            A_log=A_log,
            dt_bias=dt_bias,
            use_beta_sigmoid_in_kernel=use_beta_sigmoid_in_kernel,
            allow_neg_eigval=allow_neg_eigval,
        )
    scale = _register.default_scale(q) if scale is None else scale
    try:
        return _op(*tokens, state, state_indices, scale, use_qk_l2norm_in_kernel)
    except RuntimeError as error:
        raise _register.refusal(error, "recurrent_gated_delta_rule_") from None


def fused_recurrent_gated_delta_rule(
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
    """Gated delta rule out of place, with the arguments, gradients and errors of :func:`chunk_gated_delta_rule`.

    Without gradients and without ``cu_seqlens`` it runs token by token on a copy of the state; where a gradient may
    be asked for, or the sequences are packed, the chunk op computes the same function.

    flash-linear-attention has gk and gv between g and beta, so give beta by its name.
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
            "fused_recurrent_gated_delta_rule", tokens, initial_state, cu_seqlens, given
        )
    scale = _register.default_scale(q) if scale is None else scale
    state: Any = None if cu_seqlens is not None else _start(tokens, initial_state)
    try:
        if state is None:
            o, state = chunk_gated_delta_rule(
                *tokens,
                scale=scale,
                initial_state=initial_state,
                output_final_state=True,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                cu_seqlens=cu_seqlens,
            )
        else:
            o = _op(*tokens, state, None, scale, use_qk_l2norm_in_kernel)
    except (RuntimeError, TypeError) as error:
        raise _register.refusal(error, "fused_recurrent_gated_delta_rule") from None
    if not output_final_state:
        return o, None
    return o, state.mT if v_first else state


def _start(tokens: tuple[Tensor, ...], initial_state: Tensor | None) -> Tensor | None:
    """A state for the recurrent op to write; ``None`` where the chunk op has to work, or to refuse an argument."""
    given = tokens if initial_state is None else (*tokens, initial_state)
    q, _, v, *_ = tokens
    if not all(isinstance(t, Tensor) for t in given) or q.dim() != 4 or v.dim() != 4:
        return None
    if torch._C._are_functorch_transforms_active():
        return None  # there is no batch of calls that write in place
    if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return None
    shape, dtype = (q.shape[0], v.shape[2], q.shape[3], v.shape[3]), real_dtype(q)
    if initial_state is None:
        return q.new_zeros(shape, dtype=dtype)
    if (initial_state.shape, initial_state.dtype, initial_state.device) != (shape, dtype, q.device):
        return None
    if initial_state.layout != torch.strided:
        return None
    return initial_state.clone(memory_format=torch.contiguous_format)
