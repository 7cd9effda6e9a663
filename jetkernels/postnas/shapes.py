"""Sizes of linear blocks: (K, V, H), and the grid of stage 4 over them at equal cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from jetkernels.model import JetNemotronConfig
from jetkernels.modules import JetBlockConfig


class Shape(NamedTuple):
    """Sizes of a linear block; its recurrent state has H*K*V elements per sequence.

    Attributes:
        K: head dimension of queries and keys.
        V: head dimension of values.
        H: heads.
    """

    K: int
    V: int
    H: int

    @property
    def state(self) -> int:
        """Elements of recurrent state."""
        return self.K * self.V * self.H

    @property
    def name(self) -> str:
        """KxVxH, as in "96x256x12"."""
        return "x".join(map(str, self))

    def __str__(self) -> str:
        return self.name

    @classmethod
    def from_name(cls, name: str) -> Shape:
        """The shape of a name such as "96x256x12"; ValueError or TypeError where it is none."""
        return cls(*map(int, name.split("x")))

    def config(self, like: JetBlockConfig = JetBlockConfig()) -> JetBlockConfig:
        """The JetBlock of this shape, everything else as in `like`."""
        expand = self.V / self.K
        # The config stores V as a ratio and rounds down.
        while int(self.K * expand) < self.V:
            expand = math.nextafter(expand, math.inf)
        return replace(like, num_heads=self.H, head_dim=self.K, expand_v=expand)


def matching_shape(config: JetNemotronConfig) -> Shape:
    """The shape of the JetBlock that takes an attention layer's projections whole (`warm_start`).

    H is its number of query heads, K and V are its head size.
    """
    return Shape(config.head_size, config.head_size, config.num_attention_heads)


def equal_cache_grid(state: int, heads: Sequence[int], keys: Sequence[int]) -> list[Shape]:
    """The shapes with `state` elements of recurrent state per layer: V follows from K and H where it is whole.

    Args:
        state: K*V*H.
        heads: H to try.
        keys: K to try.

    Raises:
        ValueError: no combination divides `state`, or a number is not positive.
    """
    if state < 1 or min([*heads, *keys], default=0) < 1:
        raise ValueError(f"state, heads and keys must be positive, got {state}, {list(heads)} and {list(keys)}")
    found = [
        Shape(K, state // (K * H), H)
        for H in sorted(set(heads))
        for K in sorted(set(keys), reverse=True)
        if state % (K * H) == 0
    ]
    if not found:
        raise ValueError(
            f"state must be a multiple of K*H for some K of {list(keys)} and H of {list(heads)}, got {state}"
        )
    return found
