"""Padded batches as packed sequences: the tokens that a mask keeps, row after row, with their boundaries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unpadding:
    """Which tokens of a padded [B, T, ...] batch are real.

    Attributes:
        batch_size: B.
        width: T.
        indices: [n], their positions in the flattened batch.
        cu_seqlens: [B+1] int64, where each row starts among them.
        lengths: how many each row has, known to the host.
    """

    batch_size: int
    width: int
    indices: Tensor
    cu_seqlens: Tensor
    lengths: list[int]

    def pack(self, x: Tensor) -> Tensor:
        """Takes the real tokens [1, n, ...] out of x [B, T, ...]."""
        return x.flatten(0, 1).index_select(0, self.indices)[None]

    def restore(self, x: Tensor) -> Tensor:
        """Puts x [1, n, ...] back into a batch [B, T, ...], with zeros at the padding."""
        full = x.new_zeros(self.batch_size * self.width, *x.shape[2:])
        return full.index_copy(0, self.indices, x[0]).unflatten(0, (self.batch_size, self.width))


def find_padding(attention_mask: Tensor, batch_size: int, width: int, device: torch.device) -> Unpadding | None:
    """Finds the real tokens of a padded batch.

    Padding may be on the left, on the right or in between; it simply does not exist for the layers. The mask is read on
    the host, once: how many tokens there are decides the shapes that follow.

    Args:
        attention_mask: [B, T'], nonzero at real tokens. T' may exceed T, as it does where past tokens are counted too:
            the last T columns are those of this call.
        batch_size: B.
        width: T.
        device: of the tokens.

    Returns: None if nothing is padded.

    Raises:
        ValueError: the mask has another shape, another device, or values that are none of a mask.
    """
    if not isinstance(attention_mask, Tensor):
        raise ValueError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
    if attention_mask.device != device:
        raise ValueError(f"attention_mask must be on {device}, like the tokens, got {attention_mask.device}")
    if attention_mask.dim() != 2 or attention_mask.shape[0] != batch_size or attention_mask.shape[1] < width:
        raise ValueError(
            f"attention_mask must be [{batch_size}, {width}] (or longer, past tokens first), "
            f"got {list(attention_mask.shape)}"
        )
    if attention_mask.is_floating_point() and not (attention_mask >= 0).all():
        # Read as it is here, a mask that is added to scores would keep the padding and drop the tokens.
        raise ValueError(
            "attention_mask must be 1 at tokens and 0 at padding, got negative values or NaN: is it an additive mask?"
        )
    kept = attention_mask[:, attention_mask.shape[1] - width :] != 0
    counts = kept.sum(1)
    lengths = counts.tolist()
    if all(n == width for n in lengths):
        return None
    indices = kept.flatten().nonzero().squeeze(1)
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Unpadding(batch_size, width, indices, cu_seqlens, lengths)
