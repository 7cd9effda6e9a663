"""The model's memory of earlier tokens, as the `past_key_values` of transformers."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import Cache

from jetkernels.model import JetNemotronCache
from jetkernels.model.hybrid import JetNemotronModel


class PastKeyValues(Cache):
    """A `JetNemotronCache` that is made by the first call, for the rows it has, and made larger when it is full.

    It has one state for the whole model, so what transformers asks of single layers (`update`, `get_conv_state`, ...)
    is not here.

    Args:
        max_length: tokens that are expected for each row, which then are allocated at once. `generate` knows it.

    Attributes:
        memory: what holds the states; None before the first call.
        columns: of input_ids that the calls had, the padding too; a row may have fewer tokens.
    """

    def __init__(self, max_length: int = 1):
        super().__init__(layers=[])
        self.max_length = max_length
        self.memory: JetNemotronCache | None = None
        self.columns = 0

    def reserve(self, network: JetNemotronModel, rows: int, width: int) -> JetNemotronCache:
        """The memory, with room for `width` more tokens of each row.

        Args:
            network: whose states they are.
            rows: of this call; the memory is made for those of the first one.
            width: columns of this call.
        """
        if self.memory is None:
            self.memory = network.new_cache(rows, max(self.max_length, width))
        needed = max(self.memory.lengths) + width
        if needed > self.memory.max_length:
            # Twice as large, so that a loop of steps copies each token a few times at most.
            larger = network.new_cache(self.memory.batch_size, max(needed, 2 * self.memory.max_length))
            larger.copy_from(self.memory)
            self.memory = larger
        return self.memory

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the calls so far."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
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
        """No: see `crop`."""
        return False

    def reset(self) -> None:
        """Forgets every row; the memory stays."""
        self.columns = 0
        if self.memory is not None:
            self.memory.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row n becomes what row beam_idx[n] was.

        Args:
            beam_idx: [rows] int64 or int32.
        """
        if self.memory is not None:
            self.memory.select(beam_idx.to(self.memory.device))

    def crop(self, tokens_to_remove: int) -> None:
        """Tokens cannot be taken back from a state that has summed them up, so any but none is refused."""
        if tokens_to_remove:
            self._refuse("crop")

    def activate_past_recording(self) -> NoReturn:
        """Refused: it announces `crop`."""
        self._refuse("activate_past_recording")

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        """Refused: the memory is made for a number of rows."""
        self._refuse("batch_repeat_interleave")

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        """Refused: the memory is made for a number of rows; `reorder_cache` serves as many."""
        self._refuse("batch_select_indices")

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the model writes its states itself."""
        self._refuse("update")

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(f"past_key_values: the states of JetBlock layers do not serve {what}")


def check_cache(past_key_values: object) -> None:
    """Raises ValueError unless it is a PastKeyValues or None."""
    if past_key_values is not None and not isinstance(past_key_values, PastKeyValues):
        raise ValueError(
            "past_key_values must be a jetkernels.hf.PastKeyValues, as a call with use_cache=True returns it, "
            f"got {type(past_key_values).__name__}"
        )
