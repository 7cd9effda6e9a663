"""Reports of a search: Markdown tables, plots, and where the numbers come from."""

from __future__ import annotations

import io
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from jetkernels._optional import optional
from jetkernels._version import __version__
from jetkernels.files import write_atomic


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers that are floats get four digits behind the point."""

    def cell(value: object) -> str:
        return f"{value:.4f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(map(str, header)) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def provenance(facts: Sequence[tuple[str, object]]) -> str:
    """A table of `facts` and of what ran: software, processor, threads. Holds no time of day, so that runs can be
    compared.
    """
    machine = [
        ("jetkernels", __version__),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("machine", f"{platform.machine()}, {torch.get_num_threads()} threads"),
    ]
    return markdown_table(["what", "value"], [*facts, *machine])


def write_text(path: str | Path, text: str) -> None:
    """Writes a report in one step."""
    write_atomic(path, text.encode("utf-8"))


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    write_atomic(path, buffer.getvalue())


def _pyplot():
    optional("matplotlib", "all", "a plot of the search").use("Agg")
    from matplotlib import pyplot

    return pyplot


def heat_map(path: str | Path, rows: Sequence[str], values: Sequence[Sequence[float]], title: str) -> None:
    """A PNG of values [rows, layers]; each row's colours are scaled by its own largest magnitude, its numbers are
    written in.
    """
    pyplot = _pyplot()
    columns = len(values[0])
    figure, axes = pyplot.subplots(figsize=(2.5 + 0.8 * columns, 1.6 + 0.6 * len(rows)))
    scaled = [[v / (max(map(abs, row)) or 1.0) for v in row] for row in values]
    axes.imshow(scaled, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set_xticks(range(columns))
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="layer (0-based)", title=title)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            colour = "white" if abs(scaled[y][x]) > 0.6 else "black"
            axes.text(x, y, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=8)
    figure.tight_layout()
    _save(figure, Path(path))


def _smooth(values: Sequence[float]) -> list[float]:
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else 0.95 * smooth[-1] + 0.05 * value)
    return smooth


def curve(path: str | Path, losses: Sequence[float], title: str, label: str) -> None:
    """A PNG of a loss by step, and its running mean."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot(losses, color="0.75", linewidth=0.7, label="step")
    axes.plot(_smooth(losses), label="running mean")
    axes.set(xlabel="step", ylabel=label, title=title)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    _save(figure, Path(path))


def quality_against_speed(
    path: str | Path,
    points: Sequence[tuple[str, float, float]],
    quality: str,
    curves: Mapping[str, Sequence[float]] = {},
    minimum: float | None = None,
) -> None:
    """A PNG of (name, tokens/s, quality) points; left of them training losses by step (running means), if there are
    any.

    minimum: tokens/s that were required; drawn as a line.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2 if curves else 1, figsize=(13 if curves else 7, 4.8), squeeze=False)
    right = axes[0, -1]
    right.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    if curves:
        left = axes[0, 0]
        left.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
        for name, losses in curves.items():
            left.plot(_smooth(losses), label=name, linewidth=1)
        left.set(xlabel="step", ylabel="distillation: mean squared difference", yscale="log", title="training")
        left.legend(fontsize=8)
    for name, speed, value in points:
        right.scatter([speed], [value])
        right.annotate(name, (speed, value), textcoords="offset points", xytext=(4, 4), fontsize=8)
    if minimum is not None:
        right.axvline(minimum, color="0.5", linestyle="--", label="required")
        right.legend()
    right.set(xlabel="generation (tokens/s)", ylabel=quality, title="quality against speed")
    right.margins(x=0.15)
    figure.tight_layout()
    _save(figure, Path(path))


def pair_chart(
    path: str | Path,
    names: tuple[str, str],
    losses: tuple[Sequence[float], Sequence[float]],
    accuracies: Mapping[str, tuple[float, float]],
    speeds: Mapping[str, tuple[float, float]],
) -> None:
    """A PNG of two candidates: training losses, accuracy per task, and tokens/s, those of the second as 1."""
    pyplot = _pyplot()
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4.5))
    for name, values in zip(names, losses):
        left.plot(_smooth(values), label=name)
    left.set(xlabel="step", ylabel="distillation: mean squared difference", yscale="log", title="training")
    relative = {what: (first / second, 1.0) for what, (first, second) in speeds.items()}
    for axes, values, title in ((middle, accuracies, "accuracy"), (right, relative, f"tokens/s, {names[1]} = 1")):
        for i, name in enumerate(names):
            bars = axes.bar(
                [x + 0.4 * i - 0.2 for x in range(len(values))], [pair[i] for pair in values.values()], 0.38, label=name
            )
            axes.bar_label(bars, fmt="%.3g", fontsize=8)
        axes.set_xticks(range(len(values)), list(values))
        axes.set(title=title)
        axes.margins(y=0.15)
    for axes in (left, middle, right):
        axes.legend(fontsize=8)
    figure.tight_layout()
    _save(figure, Path(path))
