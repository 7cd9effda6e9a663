"""Numbers that people write into configurations, checked one by one.

Each function gives the number, or raises ValueError naming the field.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

# Far above any model, and small enough that the product of two and the bytes of a matrix stay below 2^63.
MAX_SIZE = 1 << 24


def count(field: str, value: object, kind: str = "positive integer") -> int:
    """1 to MAX_SIZE. A bool is no number."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field} must be a {kind}, got {shown(value)}")
    return below_limit(field, int(value))


def below_limit(field: str, value: int) -> int:
    """At most MAX_SIZE."""
    if value > MAX_SIZE:
        raise ValueError(f"{field} must be at most {MAX_SIZE}, got {shown(value)}")
    return value


def number(field: str, value: object, *, text: bool = False) -> float:
    """A finite number; with `text` also one that is written as a string, such as "1e-5"."""
    if isinstance(value, bool) or not isinstance(value, (Real, str) if text else Real):
        raise ValueError(f"{field} must be a number, got {shown(value)}")
    try:
        result = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{field} must be a number, got {shown(value)}") from None
    if not math.isfinite(result):
        raise ValueError(f"{field} must be finite, got {shown(value)}")
    return result


def same(got: object, only: object) -> bool:
    """Whether two values are equal; 0 == False, but a number is no switch."""
    return bool(got == only) and isinstance(got, bool) == isinstance(only, bool)


def shown(value: object, limit: int = 80) -> str:
    """How a value that may be anything is quoted in a message."""
    try:
        text = repr(value)
    except ValueError:
        # Python writes no integer of more than 4300 digits.
        return (
            f"an integer of {int(value).bit_length()} bits"
            if isinstance(value, Integral)
            else f"a {type(value).__name__}"
        )
    return text if len(text) <= limit else f"{text[:limit]}..."
