"""Times of two or more callables side by side: interleaved in one run, so that all see the same machine."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Timing(NamedTuple):
    median: float  # seconds
    fastest: float
    slowest: float
    n: int


def side_by_side(functions: dict[str, Callable[[], object]], repeats: int, warmup: int = 2, inner: int = 1) -> dict[str, Timing]:
    """Median, fastest and slowest time of each function over ``repeats`` interleaved rounds of ``inner`` calls."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(inner):
                function()
            seconds[name].append((time.perf_counter() - start) / inner)
    return {name: Timing(statistics.median(s), min(s), max(s), len(s)) for name, s in seconds.items()}
