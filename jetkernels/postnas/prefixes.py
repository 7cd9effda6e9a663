"""Placements that begin alike share what their first layers compute."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .super_network import Placement, SuperNetwork
from .teacher import dense_layout

KEPT_BYTES = 2**31  # of hidden states, at most


@dataclass(frozen=True)
class _Streams:
    """What the last placement computed for some rows.

    Attributes:
        placement: the last one.
        versions: of the network's parameters then.
        inputs: the residual stream in front of each layer, [B, T, C].
    """

    placement: Placement
    versions: tuple[int, ...]
    inputs: list[Tensor]


class Prefixes:
    """Logits of placements of a network, for rows that are asked about again and again.

    For each batch of rows the residual streams of the last placement are kept, up to KEPT_BYTES in all; the next one
    starts at the first layer in which it differs. Its logits are those of the network, to the bit.

    Args:
        network: whose placements are asked for; no gradients are computed.
    """

    def __init__(self, network: SuperNetwork):
        self.network = network
        self.kept: dict[tuple[int, bytes], _Streams] = {}  # by the length of the rows and their ids
        self.kept_bytes = 0

    @torch.no_grad()
    def logits(self, input_ids: Tensor, placement: Placement) -> Tensor:
        """Token ids [B, T] -> logits [B, T, vocab] of the model that the placement makes."""
        network, base = self.network, self.network.base
        key = input_ids.shape[1], input_ids.cpu().numpy().tobytes()
        versions = tuple(parameter._version for parameter in network.parameters())
        known, start = self.kept.get(key), 0
        if known is not None and known.versions == versions:
            while start < network.num_layers - 1 and known.placement[start] == placement[start]:
                start += 1
        with network.teacher.computing():
            inputs = [base.model.embed_tokens(input_ids)] if known is None or not start else known.inputs[: start + 1]
            behind: list[Tensor] = []
            model = network.assemble(placement).model
            model.layers = model.layers[start:]
            last = model(None, dense_layout(input_ids), features=behind, inputs_embeds=inputs[-1])
            logits = base.head(last)
        inputs = [*inputs, *behind[:-1]]
        size = sum(stream.nbytes for stream in inputs)
        if known is not None or self.kept_bytes + size <= KEPT_BYTES:
            self.kept_bytes += size if known is None else 0
            self.kept[key] = _Streams(placement, versions, inputs)
        return logits
