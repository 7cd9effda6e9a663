"""``jet::recurrent_gated_delta_rule_verify``: draft tokens of speculative decoding, the state pool left as it is."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import Checks, real_dtype
from jetkernels.plain import recurrent_gated_delta_rule_verify as plain


def _fake(checks: Checks, a: Any) -> Tensor:
    checks.tokens("N", a)
    checks.pool(a, "q", a.q)
    checks.drafts(a, real_dtype(a.q))
    checks.device("keys", a.keys, "q", a.q)
    checks.device("updates", a.updates, "q", a.q)
    return a.v.new_empty(a.v.shape)


_register.define(
    "recurrent_gated_delta_rule_verify",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state, Tensor? state_indices, Tensor(a!) keys, "
    "Tensor(b!) updates, float scale, bool l2norm_qk) -> Tensor",
    fake=_fake,
    plain=plain.recurrent_gated_delta_rule_verify,
)
_register.in_place(
    "recurrent_gated_delta_rule_verify", instead="chunk_gated_delta_rule or fused_recurrent_gated_delta_rule"
)
_register.autocast("recurrent_gated_delta_rule_verify", low_precision=("q", "k", "v"), fp32=("g",))
_op = torch.ops.jet.recurrent_gated_delta_rule_verify.default


def recurrent_gated_delta_rule_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    keys: Tensor,
    updates: Tensor,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> Tensor:
    """:func:`recurrent_gated_delta_rule_` without writing the state, for draft tokens.

    A prefix of the T tokens may be accepted later. What the state needs to advance by any prefix, k_t and u_t of each
    token, goes to ``keys`` and ``updates``: Hk * K + H * V numbers per token instead of the H * K * V of a state.
    :func:`recurrent_gated_delta_rule_commit_` takes them. Not differentiable; call it under ``torch.no_grad()``.

    Args:
        q: [N, T, Hk, K], as in :func:`recurrent_gated_delta_rule_`.
        k: [N, T, Hk, K].
        v: [N, T, H, V].
        g: [N, T, H].
        beta: [N, T, H].
        state: [P, H, K, V] pool as in :func:`recurrent_gated_delta_rule_`; it is only read.
        keys: [N, T, Hk, K], overwritten with k, after the l2norm if there is one; also where there is no value head.
        updates: [N, T, H, V], overwritten with ``u_t = beta_t (v_t - exp(g_t) S^T k_t)``. Both are contiguous, fp32
            (fp64 with fp64 inputs), and zeros where the index is negative.
        state_indices: as in :func:`recurrent_gated_delta_rule_`.
        scale: as in :func:`recurrent_gated_delta_rule_`.
        use_qk_l2norm_in_kernel: as in :func:`recurrent_gated_delta_rule_`.

    Returns:
        o [N, T, H, V] in v's dtype, equal to that of :func:`recurrent_gated_delta_rule_`.

    Raises:
        RuntimeError: as :func:`recurrent_gated_delta_rule_`; also when ``keys`` or ``updates`` is not contiguous, or
            shares memory with another argument. Nothing is written then.
        NotImplementedError: an input has a tangent (forward mode).

    Source: Gated Delta Networks (arXiv 2412.06464, section 3); speculative decoding (arXiv 2211.17192).
    """
    scale = _register.default_scale(q) if scale is None else scale
    try:
        return _op(q, k, v, g, beta, state, state_indices, keys, updates, scale, use_qk_l2norm_in_kernel)
    except RuntimeError as error:
        raise _register.refusal(error, "recurrent_gated_delta_rule_verify") from None
