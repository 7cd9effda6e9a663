"""The plots of reports, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from jetkernels._optional import optional
from jetkernels.files import write_atomic

from ..power_law import PowerLaw

LINES, MARKERS = ("-", "--", "-.", ":"), "os^*DvXP"  # so that curves are told apart without their colours
FEATURE_LOSS = "distillation: squared error of attention's output, relative"


def _pyplot() -> Any:
    """matplotlib.pyplot, drawing to memory; ModuleNotFoundError where matplotlib is not installed."""
    optional("matplotlib", "all", "a plot").use("Agg")
    return optional("matplotlib.pyplot", "all", "a plot")


def need() -> None:
    """Raises ModuleNotFoundError where matplotlib is not installed: what takes long asks first."""
    _pyplot()


def _save(figure: Any, path: str | Path) -> None:
    buffer = io.BytesIO()
    figure.tight_layout()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    _pyplot().close(figure)
    write_atomic(path, buffer.getvalue())


def heat_map(path: str | Path, rows: Sequence[str], values: Sequence[Sequence[float]], title: str) -> None:
    """A PNG of values [rows, layers], with the numbers written in.

    The colours of a row are scaled by its own largest magnitude.
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
    _save(figure, path)


def _smooth(values: Sequence[float]) -> list[float]:
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else 0.95 * smooth[-1] + 0.05 * value)
    return smooth


def curve(
    path: str | Path,
    losses: Sequence[float],
    title: str,
    label: str,
    *,
    seconds: Sequence[float] | None = None,
    levels: Mapping[str, float] | None = None,
) -> None:
    """A PNG of a training's loss, and its running mean.

    Args:
        path: of the file.
        losses: of every step.
        title: of the picture.
        label: what the loss is, with its unit.
        seconds: when each step ended, to draw the loss over time; None draws it over the steps.
        levels: losses to compare with, by what they are; drawn as level lines.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4))
    along = range(len(losses)) if seconds is None else seconds
    axes.plot(along, losses, color="0.75", linewidth=0.7, label="step")
    axes.plot(along, _smooth(losses), label="running mean")
    for i, (name, value) in enumerate((levels or {}).items()):
        axes.axhline(value, linestyle=":", color=f"C{2 + i}", label=f"{name} {value:.2f}")
    axes.set(xlabel="step" if seconds is None else "seconds", ylabel=label, title=title)
    axes.set_ylim(bottom=0)
    axes.legend()
    _save(figure, path)


def held_out_curve(
    path: str | Path,
    points: Sequence[tuple[int, float]],
    base: float,
    near: float,
    law: PowerLaw | None,
    distilled: int,
) -> None:
    """A PNG of the loss on held-out text over the tokens of a training.

    Args:
        path: of the file.
        points: (tokens, loss).
        base: loss of the base, a level line.
        near: how far above it another line is drawn.
        law: fitted to the distances from the base; None: none is drawn.
        distilled: tokens of the first part of the training; where both parts are, a line stands between them.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4))
    tokens = [n for n, _ in points]
    axes.plot(tokens, [loss for _, loss in points], marker="o", color="C0", label="hybrid")
    if law is not None:
        along = [tokens[-1] * (i + 1) / 200 for i in range(200) if tokens[-1] * (i + 1) / 200 >= tokens[1]]
        fitted = [base + law.distance(n) for n in along]
        axes.plot(along, fitted, linestyle="--", color="C1", label="power law, fitted")
    axes.axhline(base, linestyle=":", color="0.2", label=f"base {base:.2f}")
    axes.axhline(base + near, linestyle="-.", color="0.6", label=f"base + {near} nats")
    if 0 < distilled < tokens[-1]:
        axes.axvline(distilled, color="0.8", linewidth=1, zorder=0)
        axes.annotate(
            " whole model from here on",
            (distilled, 0.02),
            xycoords=axes.get_xaxis_transform(),
            fontsize=8,
            color="0.4",
        )
    axes.set(xlabel="tokens", ylabel="nats per token", title="loss on held-out text")
    axes.legend(fontsize=8)
    _save(figure, path)


def budget_curves(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Mapping[int, float]]],
    levels: Mapping[str, Mapping[str, float]],
) -> None:
    """A PNG of scores against the number of full-attention layers, a panel per task.

    Args:
        path: of the file.
        panels: {title: {how the layers were placed: {number of them: score}}}.
        levels: {title: {name: score that does not depend on it}}, drawn as level lines.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.5), squeeze=False)
    for panel, (title, lines) in zip(axes[0], panels.items()):
        for name, scores, style, marker in zip(lines, lines.values(), cycle(LINES), cycle(MARKERS)):
            along = sorted(scores)
            panel.plot(along, [scores[n] for n in along], linestyle=style, marker=marker, label=name)
        for i, (name, value) in enumerate(levels[title].items()):
            panel.axhline(value, linestyle=":", color=f"{0.2 + 0.4 * i}", label=name)
        panel.set_xticks(sorted({budget for scores in lines.values() for budget in scores}))
        panel.set(xlabel="layers of full attention", ylabel=title)
        panel.legend(fontsize=8)
    _save(figure, path)


def quality_against_speed(
    path: str | Path,
    points: Sequence[tuple[str, float, float]],
    quality: str,
    curves: Mapping[str, Sequence[float]] | None = None,
    minimum: float | None = None,
) -> None:
    """A PNG of quality against generation speed, beside the training losses, if there are any.

    Args:
        path: of the file.
        points: (name, tokens/s, quality) of every candidate.
        quality: what it is, in words.
        curves: {name: losses by step}, drawn as running means.
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
        left.set(xlabel="step", ylabel=FEATURE_LOSS, yscale="log", title="training")
        left.legend(fontsize=8)
    for name, speed, value in points:
        right.scatter([speed], [value])
        right.annotate(name, (speed, value), textcoords="offset points", xytext=(4, 4), fontsize=8)
    if minimum is not None:
        right.axvline(minimum, color="0.5", linestyle="--", label="required")
        right.legend()
    right.set(xlabel="generation (tokens/s)", ylabel=quality, title="quality against speed")
    right.margins(x=0.15)
    _save(figure, path)


def pair_chart(
    path: str | Path,
    names: tuple[str, str],
    losses: tuple[Sequence[float], Sequence[float]],
    accuracies: Mapping[str, tuple[float, float]],
    speeds: Mapping[str, tuple[float, float]],
) -> None:
    """A PNG of two candidates: training losses, accuracy per task, and tokens/s, those of the second as 1.

    Args:
        path: of the file.
        names: of the two.
        losses: of their trainings, by step.
        accuracies: {task: those of the two}.
        speeds: {what was timed: tokens/s of the two}.
    """
    pyplot = _pyplot()
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4.5))
    for name, of_name in zip(names, losses):
        left.plot(_smooth(of_name), label=name)
    left.set(xlabel="step", ylabel=FEATURE_LOSS, yscale="log", title="training")
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
    _save(figure, path)


def speed_against_context(
    path: str | Path,
    speeds: Mapping[str, Mapping[int, float]],
    speed_ups: Mapping[str, Mapping[int, float]],
    title: str,
) -> None:
    """A PNG of generation speed against context, beside the speed-up of the first model over the others.

    Args:
        path: of the file.
        speeds: {model: {tokens of context: tokens/s}}.
        speed_ups: {other model: {tokens of context: times its tokens/s}}.
        title: of the picture.
    """
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8))
    contexts = sorted({context for of_model in speeds.values() for context in of_model})
    for axes, curves in ((left, speeds), (right, speed_ups)):
        for i, (name, of_model) in enumerate(curves.items(), len(speeds) - len(curves)):
            along = sorted(of_model)
            axes.plot(along, [of_model[context] for context in along], marker="o", color=f"C{i}", label=name)
            for context in along:
                axes.annotate(
                    f"{of_model[context]:,.3g}",
                    (context, of_model[context]),
                    textcoords="offset points",
                    xytext=(0, 6),
                    fontsize=8,
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(contexts, [f"{c // 1024}K" if c % 1024 == 0 else str(c) for c in contexts])
        axes.set(xlabel="context (tokens)")
        axes.margins(0.1, 0.15)
        axes.grid(alpha=0.3)
        if curves:
            axes.legend(fontsize=8)
    left.set(ylabel="generation (tokens/s)", title=title)
    right.set(ylabel=f"tokens/s of {next(iter(speeds))} over those of", title="speed-up")
    _save(figure, path)
