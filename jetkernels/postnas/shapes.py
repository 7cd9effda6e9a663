"""Stage 4: sizes of the JetBlock, on a grid over (K, V, H) at equal cache, with measured generation speed as the
constraint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from jetkernels.modules import JetBlockConfig

from .candidates import Measured, over_seeds, spread_sentence
from .report import markdown_table, provenance, quality_against_speed, write_text


class Shape(NamedTuple):
    """K: head dimension of queries and keys.  V: of values.  H: heads. A layer's recurrent state has H*K*V elements."""

    K: int
    V: int
    H: int

    @property
    def state(self) -> int:
        return self.K * self.V * self.H

    @property
    def name(self) -> str:
        """KxVxH, as in "96x256x12"."""
        return "x".join(map(str, self))

    @classmethod
    def from_name(cls, name: str) -> Shape:
        return cls(*map(int, name.split("x")))

    def config(self, like: JetBlockConfig = JetBlockConfig()) -> JetBlockConfig:
        """The JetBlock of this shape, everything else as in `like`."""
        expand = self.V / self.K
        # The config stores V as a ratio and rounds down.
        while int(self.K * expand) < self.V:
            expand = math.nextafter(expand, math.inf)
        return replace(like, num_heads=self.H, head_dim=self.K, expand_v=expand)


def equal_cache_grid(state: int, heads: Sequence[int], keys: Sequence[int]) -> list[Shape]:
    """Shapes with `state` elements of recurrent state per layer: V follows from K and H where it is whole.

    Raises ValueError if no combination divides `state`.
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


def best_shape(rows: Sequence[Measured], minimum: float) -> Measured:
    """The row of the best quality among those that generate at least `minimum` tokens per second; ties go to the faster
    one.

    Raises ValueError if no row is fast enough.
    """
    fast = [row for row in rows if row.generation_per_second >= minimum]
    if not fast:
        fastest = max((row.generation_per_second for row in rows), default=0.0)
        raise ValueError(
            f"throughput must reach {minimum:,.1f} tokens/s in at least one shape; the fastest reaches {fastest:,.1f}"
        )
    return max(fast, key=lambda row: (row.quality, row.generation_per_second))


def write_shape_report(
    folder: str | Path, rows: Sequence[Measured], minimum: float, quality: str, facts: Sequence[tuple[str, object]]
) -> Measured:
    """report.md with the grid as a table of the form of the paper's Table 2, and shapes.png; returns the chosen row.

    rows: every seed of every shape.  quality: what it is, in words.
    """
    means = over_seeds(rows)
    best = best_shape(means, minimum)
    tasks = list(rows[0].scores)
    header = ["K", "V", "H", "parameters of a block", "cache (KiB)", "generation (tokens/s)", "fast enough", "chosen"]
    header += [f"{task}, {what}" for task in tasks for what in ("loss", "accuracy")]
    table = [
        [
            *Shape.from_name(row.name),
            f"{row.parameters:,}",
            f"{row.cache_bytes / 1024:.1f}",
            f"{row.generation_per_second:,.1f}",
            "yes" if row.generation_per_second >= minimum else "no",
            "**yes**" if row is best else "",
            *(value for task in tasks for value in row.scores[task]),
        ]
        for row in means
    ]
    chosen = Shape.from_name(best.name)
    text = [
        "# Sizes of the JetBlock\n",
        f"Chosen: K = {chosen.K}, V = {chosen.V}, H = {chosen.H}: the best quality among the shapes that generate at "
        f"least {minimum:,.1f} tokens/s on this machine. Every shape has {chosen.state:,} elements of state per JetBlock layer.\n",
        spread_sentence(rows),
        markdown_table(header, table),
        "![shapes](shapes.png)\n",
        "## Provenance\n",
        provenance(facts),
    ]
    points = [(row.name, row.generation_per_second, row.quality) for row in means]
    quality_against_speed(Path(folder) / "shapes.png", points, quality, minimum=minimum)
    write_text(Path(folder) / "report.md", "\n".join(text))
    return best
