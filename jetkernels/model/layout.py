"""Where the tokens of one call belong: which sequence, which position, how many came before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.types import Device

from jetkernels.modules.padding import Unpadding, find_padding

if TYPE_CHECKING:
    from .cache import JetNemotronCache


def _largest(counts: list[int]) -> int:
    """0 if there are none. `max(counts, default=0)` is not compiled where a count is symbolic."""
    return max(counts) if counts else 0


@dataclass
class TokenLayout:
    """N sequences, sequence n adding new[n] tokens to past[n] earlier ones.

    Dense: hidden states are [N, T, C] and every sequence adds T tokens. Packed: hidden states are [1, total, C],
    sequence after sequence. Counts are known to the host, so that no layer has to ask the device.

    Attributes:
        new: tokens that each sequence adds.
        past: tokens that came before them.
        positions: [N, T], [1, T] where they are the same for all, or packed [1, total]; they count from the start of
            each sequence.
        past_device: `past` as [N] int64 on the device; None in a call without a cache.
        cu_seqlens: [N+1], where each sequence starts among the packed tokens; None if dense.
        rows: [total], the sequence of each packed token; None if dense.
        offsets: [total], the number of each packed token among the new ones of its sequence; None if dense.
    """

    new: list[int]
    past: list[int]
    positions: Tensor
    past_device: Tensor | None = None
    cu_seqlens: Tensor | None = None
    rows: Tensor | None = None
    offsets: Tensor | None = None

    @classmethod
    def dense(
        cls, batch_size: int, width: int, past: list[int], past_device: Tensor | None, device: Device
    ) -> TokenLayout:
        """Of `batch_size` sequences that add `width` tokens each."""
        steps = torch.arange(width, device=device)
        if len(set(past)) > 1:
            assert past_device is not None
            positions = past_device[:, None] + steps
        else:
            positions = (steps + (past[0] if past else 0))[None]
        return cls([width] * batch_size, past, positions, past_device)

    @classmethod
    def of_step(cls, lengths: Tensor) -> TokenLayout:
        """Of one more token of each sequence after `lengths` [N] int64; reads them on the host."""
        past = lengths.tolist()
        return cls.dense(len(past), 1, past, lengths, lengths.device)

    @classmethod
    def packed(cls, new: list[int], cu_seqlens: Tensor, past: list[int], past_device: Tensor | None) -> TokenLayout:
        """Of sequences that add `new[n]` tokens each, packed into one row at the boundaries `cu_seqlens` [N+1]."""
        device = cu_seqlens.device
        counts = torch.tensor(new, device=device)
        rows = torch.arange(len(new), device=device).repeat_interleave(counts, output_size=sum(new))
        offsets = torch.arange(sum(new), device=device) - cu_seqlens[:-1].to(torch.int64)[rows]
        positions = offsets if past_device is None else offsets + past_device[rows]
        return cls(new, past, positions[None], past_device, cu_seqlens, rows, offsets)

    @property
    def past_on_device(self) -> Tensor:
        """`past` as [N] int64 on the device; there is one where the call has a cache."""
        assert self.past_device is not None
        return self.past_device

    @property
    def is_dense(self) -> bool:
        """Whether every sequence adds equally many tokens, so that nothing is packed."""
        return self.cu_seqlens is None

    @property
    def batch_size(self) -> int:
        """N."""
        return len(self.new)

    @property
    def max_new(self) -> int:
        """The most tokens that a sequence adds."""
        return _largest(self.new)

    @property
    def max_past(self) -> int:
        """The most tokens that came before in a sequence."""
        return _largest(self.past)

    @property
    def max_total(self) -> int:
        """Tokens of the longest sequence behind this call."""
        return _largest([n + p for n, p in zip(self.new, self.past)])

    @property
    def uniform_past(self) -> bool:
        """Every sequence has seen equally many tokens."""
        return len(set(self.past)) <= 1

    def pad(self, x: Tensor) -> Tensor:
        """Spreads x [1, total, ...] to [N, max_new, ...], padding (zeros) on the right; dense tensors pass."""
        if self.rows is None or self.offsets is None:
            return x
        padded = x.new_zeros(self.batch_size, self.max_new, *x.shape[2:])
        return padded.index_put((self.rows, self.offsets), x[0])

    def unpad(self, x: Tensor) -> Tensor:
        """The inverse of `pad`."""
        return x if self.rows is None or self.offsets is None else x[self.rows, self.offsets][None]

    def last(self, x: Tensor) -> Tensor:
        """Hidden states -> those of the last new token of each sequence [N, 1, C]; zeros where there is none."""
        if self.cu_seqlens is None:
            return x[:, -1:] if self.max_new else x.new_zeros(self.batch_size, 1, x.shape[-1])
        if not sum(self.new):
            return x.new_zeros(self.batch_size, 1, x.shape[-1])
        last = x[0, (self.cu_seqlens[1:].to(torch.int64) - 1).clamp(min=0)]
        empty = self.cu_seqlens[1:] == self.cu_seqlens[:-1]
        return last.masked_fill(empty[:, None], 0.0)[:, None]

    def next_labels(self, labels: Tensor, padding: Unpadding | None) -> Tensor:
        """What each token should predict: the label of its successor, -100 for the last of a sequence.

        Args:
            labels: of the tokens, as the caller gave them.
            padding: of the caller's batch, if it was packed.
        """
        if padding is not None:
            labels = padding.pack(labels)
        if not labels.shape[1]:
            return labels
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        if self.cu_seqlens is not None:
            # An empty sequence names the end of the one before it, or, if it is the first, the end of the last one.
            shifted = shifted.index_fill(1, (self.cu_seqlens[1:].to(torch.int64) - 1) % labels.shape[1], -100)
        return shifted


def arrange(
    tokens: Tensor,
    attention_mask: Tensor | None = None,
    cache: JetNemotronCache | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[TokenLayout, Unpadding | None]:
    """Checks a call of the model and finds out where each token belongs; a padded batch becomes a packed one.

    Args:
        tokens: [B, T] or [B, T, C], of which the shape and the device count.
        attention_mask: as the model's.
        cache: as the model's.
        cu_seqlens: as the model's.

    Returns: the layout, and how the batch is packed if it is padded.

    Raises:
        ValueError: an argument is wrong.
        RuntimeError: the cache cannot be used for this call.
    """
    B, T = tokens.shape[:2]
    padding = None
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask and cu_seqlens exclude each other; got both")
        if (
            not isinstance(cu_seqlens, Tensor)
            or cu_seqlens.dim() != 1
            or cu_seqlens.dtype not in (torch.int64, torch.int32)
        ):
            got = (
                f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}"
                if isinstance(cu_seqlens, Tensor)
                else type(cu_seqlens).__name__
            )
            raise ValueError(f"cu_seqlens must be a tensor [N+1] of int64 or int32, got {got}")
        if cu_seqlens.device != tokens.device:
            raise ValueError(f"cu_seqlens must be on {tokens.device}, like input_ids, got {cu_seqlens.device}")
        bounds = cu_seqlens.tolist()
        new = [b - a for a, b in zip(bounds, bounds[1:])]
        if B != 1 or not bounds or bounds[0] != 0 or bounds[-1] != T or min(new, default=0) < 0:
            raise ValueError(f"cu_seqlens must rise from 0 to T = {T} with B = 1, got {bounds} with B = {B}")
    else:
        new = [T] * B
        if attention_mask is not None:
            padding = find_padding(attention_mask, B, T, tokens.device)
        if padding is not None:
            new, cu_seqlens = padding.lengths, padding.cu_seqlens
    past, past_device = [0] * len(new), None
    if cache is not None:
        cache.check(new)
        past, past_device = list(cache.lengths), cache.lengths_device
    if cu_seqlens is not None:
        return TokenLayout.packed(new, cu_seqlens, past, past_device), padding
    return TokenLayout.dense(B, T, past, past_device, tokens.device), None
