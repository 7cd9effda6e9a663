"""Which layers to choose: beam search under a budget, exhaustive where that is little work, and layer importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb

from .super_network import Placement

Evaluate = Callable[[Placement], float]


@dataclass(frozen=True)
class Found:
    """What a search ended with.

    Attributes:
        placement: the best.
        value: its objective.
        chosen: layers (0-based) that got the kind searched for.
        values: {changed layers: objective}, of every placement looked at.
        exhaustive: whether all placements of so many layers were among them.
        budgets: {number of layers: the best so many}, of every number that was asked for.
    """

    placement: Placement
    value: float
    chosen: tuple[int, ...]
    values: Mapping[tuple[int, ...], float]
    exhaustive: bool
    budgets: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def evaluated(self) -> int:
        """Placements looked at."""
        return len(self.values)


def with_kind(placement: Sequence[str], layers: Iterable[int], kind: str) -> Placement:
    """The placement with `kind` in `layers`."""
    chosen = set(layers)
    return tuple(kind if i in chosen else old for i, old in enumerate(placement))


def uniform(layers: int, budget: int) -> tuple[int, ...]:
    """`budget` layers at equal distances: the middles of that many equal parts of the depth."""
    return tuple(int((i + 0.5) * layers / budget) for i in range(budget))


def check_search(free: int, budget: int, width: int, replaced: str = "jet") -> None:
    """Raises ValueError unless `budget` of `free` layers can be chosen by a beam of `width`."""
    if not 0 <= budget <= free:
        raise ValueError(f"budget must be between 0 and the {free} {replaced} layers, got {budget}")
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")


def _is_exhaustive(free: int, budget: int, exhaustive_up_to: int) -> bool:
    return budget == 0 or comb(free, budget) <= exhaustive_up_to


def most_evaluations(free: int, budgets: Sequence[int], width: int, exhaustive_up_to: int) -> int:
    """Placements that `beam_search` looks at, at most."""
    whole = {n for n in budgets if _is_exhaustive(free, n, exhaustive_up_to)}
    longest = max({*budgets} - whole, default=0)
    beam = sum(min(comb(free, n), width * (free - n + 1)) for n in range(1, longest + 1) if n not in whole)
    return beam + sum(comb(free, n) for n in whole)


def beam_search(
    start: Placement,
    budget: int,
    evaluate: Evaluate,
    *,
    kind: str = "attn",
    replaced: str = "jet",
    width: int = 4,
    exhaustive_up_to: int = 64,
    budgets: Sequence[int] = (),
) -> Found:
    """The `budget` layers of `start` in which `kind` in place of `replaced` makes the objective largest.

    Layers are added one at a time; of the placements of each size the `width` best go on. If there are at most
    `exhaustive_up_to` placements with so many layers, all of them are evaluated instead. One beam serves every budget:
    it goes on to the largest. Ties go to the lower layers.

    Args:
        start: the placement that layers are changed in.
        budget: layers to change.
        evaluate: placement -> objective, more is better.
        kind: what the layers become.
        replaced: kind of the layers that may change.
        width: placements of each size that go on.
        exhaustive_up_to: placements that are all evaluated.
        budgets: other numbers of layers whose best placement is wanted too.

    Raises:
        ValueError: a budget is negative or above the number of `replaced` layers, or the width is below 1.
    """
    free = [i for i, old in enumerate(start) if old == replaced]
    wanted = sorted({budget, *budgets})
    for each in wanted:
        check_search(len(free), each, width, replaced)
    values: dict[tuple[int, ...], float] = {}

    def ranked(candidates: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
        candidates = sorted(set(candidates))
        for layers in candidates:
            if layers not in values:
                values[layers] = evaluate(with_kind(start, layers, kind))
        return sorted(candidates, key=lambda layers: (-values[layers], layers))

    best: dict[int, tuple[int, ...]] = {}
    whole = [n for n in wanted if _is_exhaustive(len(free), n, exhaustive_up_to)]
    beam: list[tuple[int, ...]] = [()]
    for n in range(max({*wanted} - {*whole}, default=0) + 1):
        if n in whole:
            beam = ranked(combinations(free, n))[:width]
        elif n:
            beam = ranked({tuple(sorted((*layers, i))) for layers in beam for i in free if i not in layers})[:width]
        best[n] = beam[0]
    best |= {n: ranked(combinations(free, n))[0] for n in whole if n not in best}
    chosen, exhaustive = best[budget], budget in whole
    found = {n: best[n] for n in wanted}
    return Found(with_kind(start, chosen, kind), values[chosen], chosen, values, exhaustive, found)


def by_importance(gains: Mapping[int, float], budget: int) -> tuple[int, ...]:
    """The `budget` layers that gain most alone (`importance`), in order; ties go to the lower layers."""
    return tuple(sorted(sorted(gains, key=lambda i: (-gains[i], i))[:budget]))


def importance(start: Placement, evaluate: Evaluate, kind: str = "attn", replaced: str = "jet") -> dict[int, float]:
    """Per `replaced` layer of `start`: how much the objective gains when this layer alone becomes `kind`."""
    before = evaluate(start)
    free = [i for i, old in enumerate(start) if old == replaced]
    return {i: evaluate(with_kind(start, [i], kind)) - before for i in free}
