"""``jet::recurrent_gated_delta_rule_commit``: the state pool advanced by the accepted draft tokens."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import Checks
from jetkernels.plain import recurrent_gated_delta_rule_commit as plain


def _fake(checks: Checks, a: Any) -> None:
    checks.drafts(a, torch.float32, torch.float64)
    checks.heads("updates", "keys")
    checks.shape("g", a.g, "N", "T", "H")
    checks.floating("g", a.g)
    checks.device("updates", a.updates, "keys", a.keys)
    checks.device("g", a.g, "keys", a.keys)
    checks.index("num_accepted", a.num_accepted, "keys", a.keys)
    checks.pool(a, "keys", a.keys)
    checks.written("state", a.state)


_register.define(
    "recurrent_gated_delta_rule_commit",
    "(Tensor keys, Tensor updates, Tensor g, Tensor num_accepted, Tensor(a!) state, Tensor? state_indices) -> ()",
    fake=_fake,
    plain=plain.recurrent_gated_delta_rule_commit,
)
_register.in_place("recurrent_gated_delta_rule_commit", instead="chunk_gated_delta_rule on the accepted tokens")
_op = torch.ops.jet.recurrent_gated_delta_rule_commit.default


def recurrent_gated_delta_rule_commit_(
    keys: Tensor,
    updates: Tensor,
    g: Tensor,
    num_accepted: Tensor,
    state: Tensor,
    state_indices: Tensor | None = None,
) -> None:
    """Advance ``state`` in place by the draft tokens that were accepted: ``S <- exp(g_t) S + k_t u_t^T``.

    These are the first ``num_accepted[n]`` of each sequence that :func:`recurrent_gated_delta_rule_verify` saw. The
    pool is then what :func:`recurrent_gated_delta_rule_` on those tokens alone would have left. Not differentiable;
    call it under ``torch.no_grad()``.

    Args:
        keys: [N, T, Hk, K], as verify wrote them: contiguous, fp32 or fp64.
        updates: [N, T, H, V], as verify wrote them, in the dtype of keys.
        g: [N, T, H], as it was given to verify. Any floating dtype.
        num_accepted: [N] int32 or int64, each 0..T. It is not read on the host when it is on CUDA; a number outside
            counts as the nearer bound there. With 0 the state stays as it is.
        state: [P, H, K, V] pool that verify read, fp32 or bf16 (fp64 with fp64 keys); rounded once.
        state_indices: [N], as it was given to verify; a negative index touches no state.

    Raises:
        RuntimeError: an argument has the wrong rank, size, dtype, device or layout; an index is out of range or named
            twice, a number is not in 0..T, or g is above 0 (all checked on a CPU, and on CUDA under
            ``JETKERNELS_CHECK=1``); the pool overlaps itself or another argument. The message names the argument, and
            the pool is untouched. With gradients on, an input that requires one: the op writes in place and is not
            differentiable.
        NotImplementedError: an input has a tangent (forward mode).

    Source: Gated Delta Networks (arXiv 2412.06464, section 3); speculative decoding (arXiv 2211.17192).
    """
    try:
        _op(keys, updates, g, num_accepted, state, state_indices)
    except RuntimeError as error:
        raise _register.refusal(error, "recurrent_gated_delta_rule_commit_") from None
