"""Types of options. Each checks a value as it is read, so that no command starts that cannot end well.

What is malformed is wrong usage (ArgumentTypeError, exit code 2); what this machine lacks is a failure (RuntimeError,
OSError: exit code 1).
"""

import argparse
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

LARGEST = 2**31 - 1


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text


class UsageError(ValueError):
    """Options that are right one by one and wrong together."""


def integer(least: int = 0, most: int = LARGEST) -> Callable[[str], int]:
    """An integer from least to most."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be an integer, got {_short(text)}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {_short(text, str)}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {_short(text, str)}")
        return value

    return parse


def number(least: float, most: float = math.inf, *, above: bool = False, below: bool = False) -> Callable[[str], float]:
    """A finite number from least to most.

    Args:
        least: lower end.
        most: upper end.
        above: without the lower end itself.
        below: without the upper end itself.
    """

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {_short(text)}") from None
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be a finite number, got {_short(text, str)}")
        if value < least or (above and value == least):
            raise argparse.ArgumentTypeError(
                f"must be {'above' if above else 'at least'} {least:g}, got {_short(text, str)}"
            )
        if value > most or (below and value == most):
            raise argparse.ArgumentTypeError(
                f"must be {'below' if below else 'at most'} {most:g}, got {_short(text, str)}"
            )
        return value

    return parse


seed = integer(0, 2**63 - 1)


def integers_of(text: str) -> tuple[int, ...]:
    """The integers that `integers` let pass."""
    return tuple(int(part) for part in text.split(","))


def integers(least: int = 0, most: int = LARGEST) -> Callable[[str], str]:
    """Integers from least to most, separated by commas; as typed."""

    def parse(text: str) -> str:
        try:
            found = integers_of(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be integers separated by commas, got {_short(text)}") from None
        if min(found) < least or max(found) > most:
            raise argparse.ArgumentTypeError(f"must be integers from {least} to {most}, got {_short(text)}")
        return text

    return parse


def token_counts(text: str) -> tuple[int, ...]:
    """Numbers of tokens, separated by commas, 4K for 4096; in rising order, each once."""
    counts = set()
    try:
        for part in text.upper().split(","):
            number = part.strip().removesuffix("K")
            counts.add(int(number) * (1024 if part.strip() != number else 1))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers of tokens, such as 512,4K, got {_short(text)}") from None
    if min(counts) < 1 or max(counts) > 2**28:
        raise argparse.ArgumentTypeError(f"must be numbers of tokens from 1 to {2**28}, got {_short(text)}")
    return tuple(sorted(counts))


def default_device() -> str:
    """CUDA where PyTorch sees a device, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device(text: str) -> str:
    """The device cpu, cuda or cuda:N of this machine, as typed."""
    found = None
    with suppress(RuntimeError):
        found = torch.device(text)
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {_short(text)}")
    if found.type == "cuda":
        if torch.version.cuda is None:
            raise RuntimeError(
                f"--device {text}: this PyTorch ({torch.__version__}) is built without CUDA; use --device cpu"
            )
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise RuntimeError(f"--device {text}: PyTorch sees no CUDA device on this machine; use --device cpu")
        if (found.index or 0) >= count:
            raise RuntimeError(
                f"--device {text}: this machine has {count} CUDA device(s), the last one cuda:{count - 1}"
            )
    return text


def new_folder(text: str) -> Path:
    """Where --output goes: a folder that can be written, or that can be made."""
    path = Path(text)
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be the path of a folder, got {_short(text)}")
    present = path.absolute()
    while not os.path.lexists(present) and present != present.parent:
        present = present.parent
    if not present.is_dir():
        raise NotADirectoryError(f"--output {text}: {present} is not a folder")
    if not os.access(present, os.W_OK | os.X_OK):
        raise PermissionError(f"--output {text}: {present} cannot be written by this user")
    return path


def _short(text: str, shown: Callable[[str], str] = repr, limit: int = 60) -> str:
    return shown(text) if len(text) <= limit else f"{shown(text[:limit])}... ({len(text):,} characters)"
