"""The keys and values that an attention layer remembers: allocated once, written in place."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.types import Device


class AttentionCache:
    """Keys and values of N sequences, [N, Hkv, slots, head_dim].

    A full layer has a slot per token: the token at position p lies in slot p. A windowed layer has min(window,
    max_length) slots used as a ring: position p lies in slot p % slots, over the token that has left the window.
    """

    def __init__(
        self, batch_size: int, heads: int, slots: int, head_dim: int, *, device: Device, dtype: torch.dtype | None
    ):
        # Zeros, not empty: unused slots are masked, but a NaN would pass through 0 * NaN.
        # Nor zeros_like, which on meta imports torch's Python references: seconds.
        self.key, self.value = (
            torch.zeros(batch_size, heads, slots, head_dim, device=device, dtype=dtype) for _ in range(2)
        )

    def __iter__(self) -> Iterator[Tensor]:
        yield self.key
        yield self.value

    @property
    def slots(self) -> int:
        """Tokens that each sequence has room for."""
        return self.key.shape[2]

    def sequence(self, n: int) -> AttentionCache:
        """The memory of sequence n, as a cache of one."""
        one = copy.copy(self)
        one.key, one.value = self.key[n : n + 1], self.value[n : n + 1]
        return one

    def recent(self, past: int) -> tuple[Tensor, Tensor]:
        """What rings hold after `past` tokens each, oldest first, [N, Hkv, min(past, slots), d]."""
        if past <= self.slots:
            return self.key[:, :, :past], self.value[:, :, :past]
        # Not roll, which is a torch.cat: under fp16 autocast that refuses bf16.
        order = (torch.arange(self.slots, device=self.key.device) + past) % self.slots
        return self.key.index_select(2, order), self.value.index_select(2, order)

    def rewrite(self, key: Tensor, value: Tensor, past: int, new: list[int]) -> None:
        """Refills every slot of rings that have seen `past` tokens each from keys and values [N, Hkv, L, d].

        They are what `recent` gave, then the new ones, new[n] of sequence n, padding on the right.
        """
        held = min(past, self.slots)
        slot = torch.arange(self.slots, device=key.device)
        total = past + torch.tensor(new, device=key.device)[:, None]
        # The newest position that falls into each slot, then where it is among the given keys.
        newest = total - 1 - (total - 1 - slot) % self.slots
        index = (newest - past + held).clamp(min=0)[:, None, :, None].expand_as(self.key)
        self.key.copy_(key.gather(2, index))
        self.value.copy_(value.gather(2, index))


class AttentionDraft:
    """Stands for a cache in a call of an attention layer whose T tokens are drafts: a prefix may be accepted later.

    The layer changes no slot that holds a token: it may write behind them. The drafts' keys and values are kept here.

    Args:
        cache: of the N sequences.
    """

    def __init__(self, cache: AttentionCache):
        self.cache = cache
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None

    def keep(self, key: Tensor, value: Tensor, past: Tensor) -> None:
        """What `commit` needs: rotated keys and values [N, T, Hkv, d], and the tokens [N] that came before."""
        self._kept = key.transpose(1, 2), value.transpose(1, 2), past

    def commit(self, num_accepted: Tensor) -> None:
        """Writes the keys and values of the first tokens of each sequence into their slots.

        Args:
            num_accepted: [N] int64, each 0..T, on the device.

        Raises:
            RuntimeError: no call has verified draft tokens.
        """
        if self._kept is None:
            raise RuntimeError("AttentionDraft: no call has verified draft tokens that could be committed")
        key, value, past = self._kept
        # From the newest accepted token backwards, no more than there are slots: each has one of its own.
        back = torch.arange(min(key.shape[2], self.cache.slots), device=key.device)
        token = num_accepted[:, None] - 1 - back
        index = [t[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3]) for t in (token, past[:, None] + token)]
        token, slot = index[0], index[1] % self.cache.slots
        for memory, new in zip(self.cache, (key, value), strict=True):
            written = new.gather(2, token.clamp(min=0)).to(memory.dtype)
            memory.scatter_(2, slot, torch.where(token >= 0, written, memory.gather(2, slot)))
