"""Which layers to choose: beam search under a budget, exhaustive where that is little work, and layer importance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
        evaluated: placements looked at.
        exhaustive: whether these were all there are.
    """

    placement: Placement
    value: float
    chosen: tuple[int, ...]
    evaluated: int
    exhaustive: bool


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


def most_evaluations(free: int, budget: int, width: int, exhaustive_up_to: int) -> int:
    """Placements that `beam_search` looks at, at most."""
    if budget == 0 or comb(free, budget) <= exhaustive_up_to:
        return comb(free, budget)
    return sum(min(comb(free, n), width * (free - n + 1)) for n in range(1, budget + 1))


def beam_search(
    start: Placement,
    budget: int,
    evaluate: Evaluate,
    *,
    kind: str = "attn",
    replaced: str = "jet",
    width: int = 4,
    exhaustive_up_to: int = 64,
) -> Found:
    """The `budget` layers of `start` in which `kind` in place of `replaced` makes the objective largest.

    Layers are added one at a time; of the placements of each size the `width` best go on. If there are at most
    `exhaustive_up_to` placements with `budget` layers, all of them are evaluated instead. Ties go to the lower layers.

    Args:
        start: the placement that layers are changed in.
        budget: layers to change.
        evaluate: placement -> objective, more is better.
        kind: what the layers become.
        replaced: kind of the layers that may change.
        width: placements of each size that go on.
        exhaustive_up_to: placements that are all evaluated.

    Raises:
        ValueError: the budget is negative or above the number of `replaced` layers, or the width is below 1.
    """
    free = [i for i, old in enumerate(start) if old == replaced]
    check_search(len(free), budget, width, replaced)
    values: dict[tuple[int, ...], float] = {}

    def ranked(candidates: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
        candidates = sorted(set(candidates))
        for layers in candidates:
            if layers not in values:
                values[layers] = evaluate(with_kind(start, layers, kind))
        return sorted(candidates, key=lambda layers: (-values[layers], layers))

    exhaustive = budget == 0 or comb(len(free), budget) <= exhaustive_up_to
    if exhaustive:
        best = ranked(combinations(free, budget))[0]
    else:
        beam: list[tuple[int, ...]] = [()]
        for _ in range(budget):
            grown = {tuple(sorted((*layers, i))) for layers in beam for i in free if i not in layers}
            beam = ranked(grown)[:width]
        best = beam[0]
    return Found(with_kind(start, best, kind), values[best], best, len(values), exhaustive)


def importance(start: Placement, evaluate: Evaluate, kind: str = "attn", replaced: str = "jet") -> dict[int, float]:
    """Per `replaced` layer of `start`: how much the objective gains when this layer alone becomes `kind`."""
    before = evaluate(start)
    free = [i for i, old in enumerate(start) if old == replaced]
    return {i: evaluate(with_kind(start, [i], kind)) - before for i in free}
