"""``jet::attention_step``: attention of one new token per sequence, the caches of keys and values updated in place."""

from typing import Any

import torch
from torch import Tensor

from jetkernels.ops import _register
from jetkernels.ops._checks import Checks
from jetkernels.plain import attention_step as plain


def _fake(checks: Checks, a: Any) -> Tensor:
    checks.shape("q", a.q, "N", "H", "d")
    checks.floating("q", a.q)
    checks.shape("k", a.k, "N", "Hkv", "d")
    checks.shape("v", a.v, "N", "Hkv", "d")
    H, Hkv, d = (checks.size[symbol] for symbol in ("H", "Hkv", "d"))
    multiple = H == 0 if Hkv == 0 else H > 0 and H % Hkv == 0
    checks.require(multiple, f"q dimension 1 (H) must be a multiple of Hkv = {Hkv} (as in k), got {H}")
    even = f"q dimension 2 (d) must be even and at least 2, got {d}"
    checks.require(d >= 2, even)
    checks.require(d % 2 == 0, even)
    checks.shape("cos", a.cos, "N", "d")
    checks.shape("sin", a.sin, "N", "d")
    checks.shape("key", a.key, "N", "Hkv", "L", "d")
    checks.shape("value", a.value, "N", "Hkv", "L", "d")
    checks.require(checks.size["L"] >= 1, "key dimension 2 (L) must be at least 1, got 0")
    checks.shape("lengths", a.lengths, "N")
    checks.dtype_like("k", a.k, "q", a.q)
    checks.dtype_like("v", a.v, "q", a.q)
    checks.dtype("cos", a.cos, torch.float32)
    checks.dtype("sin", a.sin, torch.float32)
    checks.dtype_like("key", a.key, "q", a.q)
    checks.dtype_like("value", a.value, "q", a.q)
    checks.dtype("lengths", a.lengths, torch.int64)
    for name in ("k", "v", "cos", "sin", "key", "value", "lengths"):
        checks.device(name, getattr(a, name), "q", a.q)
    checks.written("key", a.key)
    checks.written("value", a.value)
    return a.q.new_empty(a.q.shape)


_register.define(
    "attention_step",
    "(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) key, Tensor(b!) value, Tensor lengths, "
    "float scale) -> Tensor",
    fake=_fake,
    plain=plain.attention_step,
)
_register.in_place("attention_step", instead="torch.nn.functional.scaled_dot_product_attention")
_register.autocast("attention_step", low_precision=("q", "k", "v"), fp32=("cos", "sin"), dtype_of="key")
_op = torch.ops.jet.attention_step.default


def attention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Causal attention of one new token of each sequence, whose key and value are stored in ``key`` and ``value``.

    q and k are rotated (rotary embedding, pairs (i, i + d/2)), k and v are written at slot ``lengths[n] % L``, and the
    token attends to the ``min(lengths[n] + 1, L)`` slots that are used then: all tokens, or the last L of them in a
    ring. Query head h reads key head ``h // (H // Hkv)``. What lies in other slots does not matter. Scores and
    probabilities are fp32 (fp64 with fp64 inputs). For decode, under ``torch.no_grad()``: not differentiable.

    Args:
        q: [N, H, d], before the rotation; d even, H a multiple of Hkv.
        k: [N, Hkv, d], before the rotation; q's dtype.
        v: [N, Hkv, d]; q's dtype.
        cos: [N, d] float32, of the angles at the new token's position.
        sin: [N, d] float32.
        key: [N, Hkv, L, d] cache, of rotated keys; q's dtype, any strides without overlap.
        value: [N, Hkv, L, d] cache; q's dtype, any strides without overlap.
        lengths: [N] int64, tokens that each sequence had before this one. It is not read on the host where it is on
            a device. A sequence of negative length gives zeros, and its caches stay as they are.
        scale: factor on the scores; ``None`` means ``d ** -0.5``.

    Returns:
        o [N, H, d] in q's dtype.

    Raises:
        RuntimeError: a wrong rank, size, dtype or device; a cache overlaps itself or another argument. The caches are
            untouched then. With gradients on, an input that requires one: the op writes in place and is not
            differentiable.
        NotImplementedError: an input has a tangent (forward mode).
    """
    scale = _register.default_scale(q) if scale is None else scale
    try:
        return _op(q, k, v, cos, sin, key, value, lengths, scale)
    except RuntimeError as error:
        raise _register.refusal(error, "attention_step_") from None
