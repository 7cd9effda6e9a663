"""Markdown tables, where the numbers come from, and how a report reaches its file."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from jetkernels._version import __version__
from jetkernels.files import write_atomic

from ..training import Losses


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers that are floats get four digits behind the point."""

    def cell(value: object) -> str:
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(map(str, header)) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def provenance(facts: Sequence[tuple[str, object]]) -> str:
    """A table of `facts` and of what ran: software, processor, threads.

    Holds no time of day, so that runs can be compared.
    """
    machine = [
        ("jetkernels", __version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads"),
    ]
    return markdown_table(["what", "value"], [*facts, *machine])


def training_speed(losses: Sequence[float]) -> str:
    """How many tokens a training saw, and how fast; nothing where that is not known or it was none."""
    if not isinstance(losses, Losses) or not losses.seconds:
        return ""
    return f"{len(losses) * losses.tokens:,} tokens at {losses.tokens_per_second:,.0f} tokens/s."


def not_exported(path: str) -> str:
    """Why there is no model; path: what its linear layers are."""
    return f"No model is exported: the config of a model cannot say that a layer is a {path}."


def write_text(path: str | Path, text: str) -> None:
    """Writes a report in one step."""
    write_atomic(path, text.encode("utf-8"))
