"""Attention of one new token of each sequence, with caches of keys and values."""

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [heads, d] by the angles [d]: pairs (i, i + d/2)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    scale: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """``jet::attention_step`` out of place, one sequence and one head after the other.

    Rotated queries and keys have the precision of the tensors that they come from and go to: that is part of the
    definition. All else is computed in ``dtype``.

    Args:
        q: [N, H, d], before the rotation.
        k: [N, Hkv, d], before the rotation.
        v: [N, Hkv, d].
        cos: [N, d].
        sin: [N, d].
        key: [N, Hkv, L, d] cache of rotated keys.
        value: [N, Hkv, L, d] cache.
        lengths: [N] tokens before this one; a negative length touches no cache and gives zeros.
        scale: factor of the scores.
        dtype: of the arithmetic, and of what is returned.

    Returns:
        o [N, H, d], and the caches after the call [N, Hkv, L, d], in ``dtype``.
    """
    stored = key.dtype
    q, k, v, cos, sin = (t.to(dtype) for t in (q, k, v, cos, sin))
    key, value, o = key.to(dtype, copy=True), value.to(dtype, copy=True), torch.zeros_like(q)
    group, L = q.shape[1] // max(k.shape[1], 1), key.shape[2]
    for n, length in enumerate(lengths.tolist()):
        if length < 0:
            continue
        key[n, :, length % L] = rotate(k[n], cos[n], sin[n]).to(stored)
        value[n, :, length % L] = v[n]
        used = min(length + 1, L)
        rotated = rotate(q[n], cos[n], sin[n]).to(stored).to(dtype)
        for h in range(q.shape[1]):
            scores = scale * (key[n, h // group, :used] @ rotated[h])
            o[n, h] = scores.softmax(0) @ value[n, h // group, :used]
    return o, key, value
