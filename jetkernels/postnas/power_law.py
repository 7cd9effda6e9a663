"""A power law through a curve of losses, to say where it would lead."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

FEWEST_POINTS = 3
LARGEST = math.log(sys.float_info.max)


@dataclass(frozen=True)
class PowerLaw:
    """distance = scale * tokens ** -exponent.

    Attributes:
        scale: distance at one token.
        exponent: positive.
        error: of the fit: standard deviation of ln(distance).
        points: that it was fitted to.
    """

    scale: float
    exponent: float
    error: float
    points: int

    def distance(self, tokens: float) -> float:
        """At so many tokens."""
        return self.scale * tokens**-self.exponent

    def tokens(self, distance: float) -> float:
        """At which the distance is reached; infinite where no float holds them."""
        try:
            return float((self.scale / distance) ** (1 / self.exponent))
        except OverflowError:
            return math.inf


def fit_power_law(points: Sequence[tuple[float, float]]) -> PowerLaw | None:
    """The power law of least squares in ln(distance).

    None where the points do not fall, are at fewer than FEWEST_POINTS different numbers of tokens, or fall so fast that
    no float holds the scale.

    Args:
        points: (tokens, distance); those that are not positive are left out.
    """
    logs = [(math.log(tokens), math.log(distance)) for tokens, distance in points if tokens > 0 and distance > 0]
    if len({x for x, _ in logs}) < FEWEST_POINTS:
        return None
    slope, intercept = statistics.linear_regression(*zip(*logs))
    if not slope < 0 or intercept > LARGEST:
        return None
    rest = sum((y - intercept - slope * x) ** 2 for x, y in logs)
    return PowerLaw(math.exp(intercept), -slope, math.sqrt(rest / (len(logs) - 2)), len(logs))
