"""The frozen base as a teacher: what each of its attention layers is given, and what it makes of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from jetkernels.model import JetNemotronForCausalLM
from jetkernels.model.layout import TokenLayout

from .precision import computing

# Added to the mean square of an attention layer's output, which may be zero.
FLOOR = 1e-6


class MixerCall(NamedTuple):
    """One call of a token mixer.

    Attributes:
        input: [B, T, C].
        told: the other arguments, by name: layout, rotary angles.
        output: [B, T, C].
    """

    input: Tensor
    told: Mapping[str, Any]
    output: Tensor


@contextmanager
def watched(model: JetNemotronForCausalLM) -> Iterator[list[MixerCall]]:
    """Every call of the model's token mixers in this block, in their order."""
    calls: list[MixerCall] = []

    def note(mixer: nn.Module, arguments: tuple[Tensor], told: dict[str, Any], output: Tensor) -> None:
        calls.append(MixerCall(arguments[0], told, output))

    mixers = [cast(nn.Module, layer.self_attn) for layer in model.model.layers]
    handles = [mixer.register_forward_hook(note, with_kwargs=True) for mixer in mixers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def dense_layout(input_ids: Tensor) -> TokenLayout:
    """That of whole sequences [B, T], none padded."""
    B, T = input_ids.shape
    return TokenLayout.dense(B, T, [0] * B, None, input_ids.device)


def feature_loss(got: Tensor, wanted: Tensor) -> Tensor:
    """|got - wanted|^2 / |wanted|^2 of each sequence, mean over the sequences; both [B, T, C]."""
    error = (got.float() - wanted.float()).square().mean((1, 2))
    return (error / (wanted.float().square().mean((1, 2)) + FLOOR)).mean()


class Teacher:
    """A base whose parameters stop requiring gradients, and the features of the rows it was last asked about.

    Args:
        base: full attention in every layer.
        precision: of its products and its networks', "fp32" or "bf16" (`precision.computing`).
    """

    def __init__(self, base: JetNemotronForCausalLM, precision: str = "fp32"):
        self.base = base.requires_grad_(False)
        self.precision = precision
        self._input_ids: Tensor | None = None
        self._calls: list[MixerCall] = []

    def computing(self) -> torch.autocast:
        """A block in which products are made in the teacher's precision."""
        return computing(self.precision, self.base.device)

    @torch.no_grad()
    def attention(self, input_ids: Tensor) -> list[MixerCall]:
        """What each attention layer is given and makes of it, for token ids [B, T].

        Computed once for the same ids in a row, whichever paths and networks ask.
        """
        if self._input_ids is None or not torch.equal(self._input_ids, input_ids):
            self._calls = []  # freed before the next ones are made
            with self.computing(), watched(self.base) as calls:
                self.base.model(input_ids, dense_layout(input_ids))
            self._input_ids, self._calls = input_ids.clone(), calls
        return self._calls
