"""The choice of the next token."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def most_likely(logits: Tensor) -> Tensor:
    """The argmax [B] of logits [B, vocab]; the first of equals, and NaN above all.

    On a CPU torch finds the place of a maximum at a sixth of the speed at which it finds the maximum: so first the part
    of the vocabulary, then the place in it.
    """
    B, vocab = logits.shape
    parts = math.gcd(vocab, 128)
    if logits.device.type != "cpu" or parts < 8:
        return logits.argmax(-1)
    split = logits.reshape(B, parts, vocab // parts)
    part = split.amax(-1).argmax(-1)
    inside = split.gather(1, part[:, None, None].expand(B, 1, vocab // parts)).argmax(-1)[:, 0]
    return part * (vocab // parts) + inside


def choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Next tokens [B] from logits [B, vocab]: the most likely at temperature 0, else a draw.

    top_k keeps that many tokens, top_p the fewest most likely ones whose probabilities reach it; both: top_k first.
    """
    limits = torch.finfo(torch.float32)
    # Below it fp32 has zero, and a draw would be the most likely token anyway; above it infinity, and all tokens are
    # alike.
    if temperature < limits.tiny:
        return most_likely(logits)
    temperature = min(temperature, limits.max)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The largest becomes zero, which no temperature turns into infinity.
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        # By index, not by value: exactly top_k tokens survive a tie.
        values, indices = logits.topk(top_k, -1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, indices, values)
    if top_p is not None and top_p < 1:
        ordered, indices = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        # The most likely token has nothing before it, so one always stays.
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, indices, ordered)
    # The index of the smallest of exponential draws at rates p is distributed as p; nothing has to reach the host.
    draws = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / draws).argmax(-1)
