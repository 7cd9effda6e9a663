"""What a call of the model returns."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor

from .cache import JetNemotronCache


class CausalLMOutput(OrderedDict):  # FSDP makes a dict of a dict's subclass, and another of these of one of these
    """What a call of the model gives: loss, logits and cache, in this order, those that are not None.

    Each is read as an attribute, by name or, as the outputs of transformers' models, by position among those that are
    there: [0] is the loss of a call with labels and the logits of one without. `to_tuple` unpacks.
    """

    def __init__(self, *args: Any, **fields: Any):
        super().__init__({name: value for name, value in dict(*args, **fields).items() if value is not None})

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple:
        """What there is, in order."""
        return tuple(self.values())

    @property
    def loss(self) -> Tensor | None:
        """A scalar, if labels were given."""
        return self.get("loss")

    @property
    def logits(self) -> Tensor:
        """[B, T, vocab]; [N, 1, vocab] with last_logits_only."""
        return self["logits"]

    @property
    def cache(self) -> JetNemotronCache | None:
        """The one that was given."""
        return self.get("cache")
