"""Markdown tables, where the numbers come from, and how a report reaches its file."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from jetkernels._version import __version__
from jetkernels.files import write_atomic

from ..tasks import Score
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


def plain_scores(scores: Mapping[str, Score]) -> dict[str, list[float]]:
    """{task: [loss, accuracy]}, for JSON."""
    return {task: [score.loss, score.accuracy] for task, score in scores.items()}


def quoted(text: str) -> str:
    """Text that a model wrote, as code in a cell of a table: line ends are arrows, unprintable characters boxes."""
    shown = "".join(c if c.isprintable() else "\ufffd" for c in text.replace("\n", "\u21b5").replace("\t", " "))
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    shown = shown.replace("|", "\\|")
    if not shown.strip():
        return f"({len(shown)} blanks)" if shown else "(nothing)"
    return f"{fence} {shown} {fence}"


def file_table(folder: Path) -> str:
    """The files of a folder with their sizes and SHA-256: what a report names where weights are not kept with it."""
    rows: list[list[object]] = []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with open(path, "rb") as file:
            rows.append([path.name, f"{path.stat().st_size:,}", f"`{hashlib.file_digest(file, 'sha256').hexdigest()}`"])
    return markdown_table(["file", "bytes", "SHA-256"], rows)


def training_speed(losses: Sequence[float]) -> str:
    """How many tokens a training saw, and how fast; nothing where that is not known or it was none."""
    if not isinstance(losses, Losses) or not losses.seconds:
        return ""
    return f"{losses.all_tokens:,} tokens in {losses.seconds:,.1f} s, {losses.tokens_per_second:,.0f} tokens/s."


def not_exported(path: str) -> str:
    """Why there is no model; path: what its linear layers are."""
    return f"No model is exported: the config of a model cannot say that a layer is a {path}."


def write_text(path: str | Path, text: str) -> None:
    """Writes a report in one step."""
    write_atomic(path, text.encode("utf-8"))
