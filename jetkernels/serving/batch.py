"""The sequences of one step of an engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def rows_of(state_indices: Tensor, reserved: int = 0) -> Tensor:
    """Rows as the ops take them, where an engine fills a batch up with a row that it has reserved for that.

    Args:
        state_indices: [N] int32 or int64.
        reserved: the row that belongs to no request: 0 in vLLM and SGLang, which name it again and again.

    Returns: [N], -1 in its place.
    """
    return torch.where(state_indices == reserved, -1, state_indices)


@dataclass(frozen=True)
class RaggedBatch:
    """N sequences whose tokens of this step lie one behind the other, those that decode first.

    Attributes:
        num_decodes: how many of them have one token and a state; known to the host.
        query_start_loc: [N+1] int32 or int64, where each begins among the tokens.
        state_indices: [N] int32 or int64, rows of the pools; a negative one touches no state (`rows_of`). Where there
            is such a one, row 0 belongs to nobody.
        has_initial_state: [N] bool, whether something of the sequence has been read before: only then is its row read.
            None: of those that decode, and of no prompt.
        mark_tokens: [M] int32 or int64, numbers of tokens of the step, of prompts, after which the states are kept in
            rows of their own, for prompts that begin alike: a multiple of 64 behind where its prompt begins in this
            step, or its end.
        mark_indices: [M] int32 or int64, these rows, none negative; given with mark_tokens.
    """

    num_decodes: int
    query_start_loc: Tensor
    state_indices: Tensor
    has_initial_state: Tensor | None = None
    mark_tokens: Tensor | None = None
    mark_indices: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        """N."""
        return self.state_indices.shape[0]

    def check(self, tokens: int) -> None:
        """ValueError unless the shapes fit each other and a row of so many tokens; nothing is read from the device."""
        N = self.num_sequences
        if self.state_indices.dim() != 1 or self.query_start_loc.shape != (N + 1,):
            raise ValueError(
                f"RaggedBatch: query_start_loc must be [N+1] for state_indices [N], got "
                f"{list(self.query_start_loc.shape)} and {list(self.state_indices.shape)}"
            )
        if not 0 <= self.num_decodes <= min(N, tokens):
            raise ValueError(
                f"RaggedBatch: num_decodes must be between 0 and the {min(N, tokens)} sequences that have a token, "
                f"got {self.num_decodes}"
            )
        has = self.has_initial_state
        if (self.mark_tokens is None) != (self.mark_indices is None):
            given = "mark_tokens" if self.mark_indices is None else "mark_indices"
            raise ValueError(f"RaggedBatch: mark_tokens and mark_indices go together, got only {given}")
        if has is not None and (has.shape != (N,) or has.dtype != torch.bool):
            raise ValueError(f"RaggedBatch: has_initial_state must be [{N}] bool, got {has.dtype} {list(has.shape)}")
