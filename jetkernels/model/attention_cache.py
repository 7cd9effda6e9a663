"""The keys and values that an attention layer remembers: allocated once, written in place."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.types import Device

from .layout import TokenLayout


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

    def write(self, key: Tensor, value: Tensor, layout: TokenLayout) -> None:
        """Stores new keys and values, [N, T, Hkv, d] or packed [1, total, Hkv, d], each in its slot.

        No two tokens of one sequence may fall into one slot.
        """
        for buffer, new in ((self.key, key), (self.value, value)):
            if layout.is_dense and layout.uniform_past and self._contiguous(layout):
                start = layout.max_past % self.slots
                buffer[:, :, start : start + layout.max_new].copy_(new.transpose(1, 2))
            elif layout.is_dense:
                rows = torch.arange(layout.batch_size, device=new.device)[:, None]
                buffer[rows, :, layout.positions % self.slots] = new.to(buffer.dtype)
            else:
                buffer[layout.rows, :, layout.positions[0] % self.slots] = new[0].to(buffer.dtype)

    def _contiguous(self, layout: TokenLayout) -> bool:
        return layout.max_past % self.slots + layout.max_new <= self.slots

    def recent(self, count: int, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """The last `count` keys and values of each ring, oldest first, [N, Hkv, count, d].

        A sequence of fewer than `count` tokens has something meaningless, but finite, in front.
        """
        device = self.key.device
        if layout.uniform_past:
            positions = torch.arange(layout.max_past - count, layout.max_past, device=device) % self.slots
            return self.key[:, :, positions], self.value[:, :, positions]
        positions = (layout.past_on_device[:, None] + torch.arange(-count, 0, device=device)) % self.slots
        return self._gather(self.key, positions), self._gather(self.value, positions)

    @staticmethod
    def _gather(x: Tensor, index: Tensor) -> Tensor:
        """Gathers x [N, Hkv, L, d] at index [N, M] -> [N, Hkv, M, d]."""
        return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    def rewrite(self, key: Tensor, value: Tensor, past: int, layout: TokenLayout) -> None:
        """Refills every slot of the ring from keys and values [N, Hkv, past + T, d].

        Their first `past` are what `recent` gave, the others new, padding on the right. Any number of new tokens.
        """
        slot = torch.arange(self.slots, device=key.device)
        before = torch.tensor(layout.past, device=key.device)[:, None]
        total = before + torch.tensor(layout.new, device=key.device)[:, None]
        # The newest position that falls into each slot, then where it is among the given keys.
        newest = total - 1 - (total - 1 - slot) % self.slots
        index = (newest - before + past).clamp(min=0)
        self.key.copy_(self._gather(key, index))
        self.value.copy_(self._gather(value, index))
