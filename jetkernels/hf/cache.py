"""The model's memory of earlier tokens, as the `past_key_values` of transformers."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from jetkernels.model import JetNemotronCache
from jetkernels.model.network import JetNemotronModel


class PastKeyValues(Cache):
    """A `JetNemotronCache` that is made by the first call, for the rows it has, and made larger when it is full.

    It has one state for the whole model, so what transformers asks of single layers (`update`, `get_conv_state`, ...)
    is not here.

    Args:
        max_length: tokens that are expected for each row, which then are allocated at once. `generate` knows it.

    Attributes:
        memory: what holds the states; None before the first call.
        columns: of input_ids that the calls had, the padding too; a row may have fewer tokens.
        is_recording: the tokens of a call are drafts, which `crop` may take back before the next one.
    """

    def __init__(self, max_length: int = 1):
        super().__init__(layers=[])
        self.max_length = max_length
        self.memory: JetNemotronCache | None = None
        self.columns = 0
        self.is_recording = False
        self._drafts: list[int] | None = None  # tokens of each row that wait for `crop`

    def reserve(self, network: JetNemotronModel, rows: int, width: int) -> JetNemotronCache:
        """The memory, with room for `width` more tokens of each row. The drafts of the call before are accepted.

        Args:
            network: whose states they are.
            rows: of this call; the memory is made for those of the first one.
            width: columns of this call.

        Raises:
            ValueError: the memory is another model's.
        """
        self.crop(0)
        if self.memory is None:
            self.memory = network.new_cache(rows, max(self.max_length, width))
        self.memory.check_model(network.config, network.device, network.dtype)
        needed = max(self.memory.lengths) + width
        if needed > self.memory.max_length:
            # Twice as large, so that a loop of steps copies each token a few times at most.
            larger = network.new_cache(self.memory.batch_size, max(needed, 2 * self.memory.max_length))
            larger.copy_from(self.memory)
            self.memory = larger
        return self.memory

    def count(self, width: int, new: list[int]) -> None:
        """Counts the columns of a finished call, and its new tokens of each row."""
        self.columns += width
        if self.is_recording:
            self._drafts = new

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the calls so far."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def __len__(self) -> int:
        return 0 if self.memory is None else len(self.memory.layers)

    def __repr__(self) -> str:
        return f"PastKeyValues({self.columns} columns)"

    @property
    def is_initialized(self) -> bool:
        """Whether there has been a call."""
        return self.memory is not None

    @property
    def is_compileable(self) -> bool:
        """No: the counts of tokens are on the host."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Yes, by the tokens of the last call, if that was recorded."""
        return True

    def reset(self) -> None:
        """Forgets every row; the memory stays."""
        self.columns, self._drafts = 0, None
        if self.memory is not None:
            self.memory.reset()

    def activate_past_recording(self) -> None:
        """From here on `crop` may take back tokens of the call before it."""
        self.is_recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last tokens of each row.

        Args:
            tokens_to_remove: how many, as a negative number; 0 accepts all.

        Raises:
            ValueError: they are not all of the last call, or that was not recorded: a state has summed them up.
        """
        if (
            tokens_to_remove > 0
            or (self._drafts is None and tokens_to_remove)
            or -tokens_to_remove > min(self._drafts or [0])
        ):
            last = "none" if self._drafts is None else f"{min(self._drafts)}"
            raise ValueError(
                "past_key_values: tokens_to_remove must be a number from 0 down to minus the tokens of the last call "
                f"after activate_past_recording() ({last}), got {tokens_to_remove}"
            )
        if self._drafts is not None:
            assert self.memory is not None
            self.memory.commit([count + tokens_to_remove for count in self._drafts])
            self._drafts = None
            self.columns += tokens_to_remove

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps rows, in any order, or repeats them.

        Args:
            indices: [N] of the rows.
        """
        self.crop(0)
        if self.memory is not None:
            self.memory.select_(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row n becomes what row beam_idx[n] was.

        Args:
            beam_idx: [rows].
        """
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row becomes `repeats` equal ones."""
        if self.memory is not None:
            self.batch_select_indices(torch.arange(self.memory.batch_size).repeat_interleave(repeats))

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the model writes its states itself."""
        raise NotImplementedError("past_key_values: there is no update of a layer: the model writes its states itself")


def check_cache(past_key_values: object) -> None:
    """Raises ValueError unless it is a PastKeyValues or None."""
    if past_key_values is not None and not isinstance(past_key_values, PastKeyValues):
        raise ValueError(
            "past_key_values must be a jetkernels.hf.PastKeyValues, as a call with use_cache=True returns it, "
            f"got {type(past_key_values).__name__}"
        )
