"""Which of the measured candidates is chosen: the best one, or the best of those that are fast enough."""

from __future__ import annotations

from collections.abc import Sequence

from .candidates import Measured


def best_candidate(rows: Sequence[Measured]) -> Measured:
    """The row of the best quality; ties go to the faster one. rows: one per candidate (`over_seeds`)."""
    return max(rows, key=lambda row: (row.quality, row.generation_per_second))


def best_shape(rows: Sequence[Measured], minimum: float) -> Measured:
    """The best candidate (`best_candidate`) among those that generate fast enough.

    Args:
        rows: one per candidate.
        minimum: tokens per second that must be generated.

    Raises:
        ValueError: no candidate is fast enough.
    """
    fast = [row for row in rows if row.generation_per_second >= minimum]
    if not fast:
        fastest = max((row.generation_per_second for row in rows), default=0.0)
        raise ValueError(
            f"throughput must reach {minimum:,.1f} tokens/s in at least one shape; the fastest reaches {fastest:,.1f}"
        )
    return best_candidate(fast)
