"""Attention of one new token per sequence over caches of keys and values, in plain PyTorch."""

import torch

from ._compute import accumulation_dtype, contiguous_as, plain_op

SLOTS = 4096  # whose keys are held in the arithmetic type at a time


@plain_op
def attention_step(q, k, v, cos, sin, key, value, lengths, scale):
    """jet::attention_step.

    q [N,H,d], k and v [N,Hkv,d] before the rotation, cos and sin [N,d], key and value [N,Hkv,L,d] updated in place,
    lengths [N] -> o [N,H,d]; zeros where the length is negative, and no slot changes for it.
    """
    if q.numel() == 0:
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    (N, H, d), (Hkv, L), dtype = q.shape, key.shape[1:3], accumulation_dtype(q)
    there = lengths >= 0
    cos, sin = cos[:, None].to(dtype), sin[:, None].to(dtype)
    _put(key, _rotate(k.to(dtype), cos, sin), lengths, there)
    _put(value, v, lengths, there)
    q = _rotate(q.to(dtype), cos, sin).to(q.dtype).to(dtype).view(N, Hkv, H // Hkv, d)
    seen = torch.arange(L, device=q.device) <= lengths[:, None]  # in a full ring all of them
    seen = seen[:, None, :, None]
    blocks = range(0, L, SLOTS)
    scores = torch.cat([q @ _block(key, seen, j, dtype).mT for j in blocks], -1)
    p = (scores * scale).masked_fill(~seen.mT, -torch.inf).softmax(-1)
    o = sum(p[..., j : j + SLOTS] @ _block(value, seen, j, dtype) for j in blocks).view(N, H, d)
    return contiguous_as(torch.where(there[:, None, None], o, 0), v.dtype)


def _rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _put(cache, new, lengths, there):
    """Write new [N,Hkv,d] at the slots of the sequences that are there."""
    rows, slots = torch.arange(cache.shape[0], device=cache.device), lengths % cache.shape[2]
    old = cache[rows, :, slots]
    cache[rows, :, slots] = torch.where(there[:, None, None], new.to(cache.dtype), old)


def _block(cache, seen, j, dtype):
    """Slots from j on, with zeros for those that no query sees: they may hold anything, and 0 * NaN is NaN."""
    return torch.where(seen[:, :, j : j + SLOTS], cache[:, :, j : j + SLOTS], 0).to(dtype)
