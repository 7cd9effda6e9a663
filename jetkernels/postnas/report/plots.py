"""The plots of reports, as PNG files."""

from __future__ import annotations

import io
import math
import statistics
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
    figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
    _pyplot().close(figure)
    write_atomic(path, buffer.getvalue())


def heat_map(path: str | Path, rows: Sequence[str], values: Sequence[Sequence[float]], title: str, label: str) -> None:
    """A PNG of values [rows, layers], with the numbers written in and a colour bar: one scale for all rows.

    The scale is linear up to a 20th of the largest magnitude and logarithmic beyond it, so that rows of small values
    are not blank beside rows of large ones.

    Args:
        path: of the file.
        rows: their names.
        values: of each row, by layer; NaN where there is none, which stays blank.
        title: of the picture.
        label: what the values are.
    """
    pyplot, colours = _pyplot(), optional("matplotlib.colors", "all", "a plot")
    columns = len(values[0])
    figure, axes = pyplot.subplots(figsize=(4.5 + 0.55 * columns, 1.6 + 0.6 * len(rows)))
    largest = max((abs(value) for row in values for value in row if not math.isnan(value)), default=0.0) or 1.0
    norm = colours.SymLogNorm(linthresh=largest / 20, vmin=-largest, vmax=largest)
    image = axes.imshow(values, aspect="auto", cmap="RdBu_r", norm=norm)
    ticks = [share * largest for share in (-1, -0.2, -0.05, 0, 0.05, 0.2, 1)]
    bar = figure.colorbar(image, ax=axes, ticks=ticks, label=label, pad=0.02)
    bar.minorticks_off()
    bar.ax.set_yticklabels([f"{tick:.2g}" for tick in ticks])
    axes.set_xticks(range(columns))
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel="layer (0-based)", title=title)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if math.isnan(value):
                continue
            dark = not 0.2 < norm(value) < 0.8
            axes.text(x, y, f"{value:.2g}", ha="center", va="center", color="white" if dark else "black", fontsize=7)
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
        axes.axvline(distilled, color="0.8", zorder=0, label="the whole model from here on")
    axes.set(xlabel="tokens", ylabel="nats per token", title="loss on held-out text")
    axes.xaxis.set_major_formatter("{x:,.0f}")
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
            drawn = style if len(along) > 1 else ""
            panel.plot(along, [scores[n] for n in along], linestyle=drawn, marker=marker, label=name)
        for i, (name, value) in enumerate(levels[title].items()):
            panel.axhline(value, linestyle=":", color=f"{0.2 + 0.4 * i}", label=name)
        panel.set_xticks(sorted({budget for scores in lines.values() for budget in scores}))
        panel.set(xlabel="layers of full attention", ylabel=title)
        panel.legend(fontsize=8)
    _save(figure, path)


def placements_tried(
    path: str | Path, tried: Sequence[tuple[int, float]], marked: Mapping[str, Mapping[int, float]], score: str
) -> None:
    """A PNG of every placement that a search looked at: its score against its number of full layers.

    Args:
        path: of the file.
        tried: (full layers, score).
        marked: {how the layers were placed: {number of them: score}}.
        score: what it is, in words.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.plot([n for n, _ in tried], [value for _, value in tried], "_", color="0.55", label="tried", markersize=10)
    offsets = [0.12 * (i - (len(marked) - 1) / 2) for i in range(len(marked))]
    for (name, scores), offset, marker in zip(marked.items(), offsets, cycle(MARKERS)):
        at = [n + offset for n in scores]  # side by side where they are the same placement
        axes.plot(at, list(scores.values()), marker, label=name, markerfacecolor="none", markeredgewidth=1.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="layers of full attention", ylabel=score, title=f"every placement tried: {len(tried)}")
    axes.legend(fontsize=8)
    _save(figure, path)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; 0 for one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def quality_against_speed(
    path: str | Path,
    points: Sequence[tuple[str, float, Sequence[float]]],
    quality: str,
    curves: Mapping[str, Sequence[float]] | None = None,
    minimum: float | None = None,
    level: tuple[str, float] | None = None,
) -> None:
    """A PNG of quality against generation speed, beside the training losses, if there are any.

    Args:
        path: of the file.
        points: (name, tokens/s, quality of every seed) of every candidate; drawn as means with their standard
            deviation.
        quality: what it is, in words.
        curves: {name: losses by step}, drawn as running means.
        minimum: tokens/s that were required; drawn as a line.
        level: (name, quality) to compare with; drawn as a line.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2 if curves else 1, figsize=(13 if curves else 7, 4.8), squeeze=False)
    right = axes[0, -1]
    colours = pyplot.get_cmap("tab20").colors
    if curves:
        left = axes[0, 0]
        for (name, losses), colour, style in zip(curves.items(), cycle(colours), cycle(LINES)):
            left.plot(_smooth(losses), label=name, linewidth=1, color=colour, linestyle=style)
        left.set(xlabel="step", ylabel=FEATURE_LOSS, yscale="log", title="training")
        left.legend(fontsize=8)
    named = []
    for (name, speed, values), colour in zip(points, cycle(colours)):
        value, deviation = _mean(values)
        right.errorbar([speed], [value], [deviation] if len(values) > 1 else None, fmt="o", color=colour, capsize=3)
        named.append((value, speed, name))
    # Beside the axes, in the order of their quality, at equal distances: points may lie on each other, names do not.
    for i, (value, speed, name) in enumerate(sorted(named)):
        leader = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "relpos": (0, 0.5)}
        at = {"xytext": (1.03, (i + 0.5) / len(named)), "textcoords": "axes fraction", "va": "center", "fontsize": 8}
        right.annotate(name, (speed, value), arrowprops=leader, **at)
    if minimum is not None:
        right.axvline(minimum, color="0.5", linestyle="--", label="required")
    if level is not None:
        right.axhline(level[1], color="0.2", linestyle=":", label=level[0])
    if minimum is not None or level is not None:
        right.legend(fontsize=8)
    spread = ", standard deviation over seeds" if any(len(values) > 1 for *_, values in points) else ""
    right.set(xlabel="generation (tokens/s)", ylabel=quality, title=f"quality against speed{spread}")
    right.margins(0.1, 0.15)
    _save(figure, path)


def pair_chart(
    path: str | Path,
    names: tuple[str, str],
    losses: tuple[Sequence[float], Sequence[float]],
    accuracies: Mapping[str, Sequence[Sequence[float]]],
    speeds: Mapping[str, Sequence[Sequence[float]]],
) -> None:
    """A PNG of two candidates: training losses, accuracy per task, and tokens/s, the mean of the second as 1.

    Bars are means over the seeds, with their standard deviation.

    Args:
        path: of the file.
        names: of the two.
        losses: of their trainings, by step.
        accuracies: {task: those of the two, of every seed}.
        speeds: {what was timed: tokens/s of the two, of every seed}.
    """
    pyplot = _pyplot()
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(14, 4.5))
    for name, of_name, style in zip(names, losses, LINES):
        left.plot(_smooth(of_name), label=name, linestyle=style)
    left.set(xlabel="step", ylabel=FEATURE_LOSS, yscale="log", title="training")
    ones = {what: statistics.mean(second) for what, (_, second) in speeds.items()}
    relative = {what: [[v / ones[what] for v in values] for values in pair] for what, pair in speeds.items()}
    for axes, shown, title in ((middle, accuracies, "accuracy"), (right, relative, f"tokens/s, {names[1]} = 1")):
        for i, (name, hatch) in enumerate(zip(names, ("", "//"))):
            means, deviations = zip(*(_mean(pair[i]) for pair in shown.values()))
            at = [x + 0.4 * i - 0.2 for x in range(len(shown))]
            spread = deviations if any(deviations) else None
            bars = axes.bar(at, means, 0.38, yerr=spread, capsize=4, label=name, hatch=hatch, edgecolor="white")
            axes.bar_label(bars, fmt="%.3g", fontsize=8)
        axes.set_xticks(range(len(shown)), list(shown), rotation=15, ha="right")
        axes.set(title=title)
        axes.margins(y=0.25)
    for axes in (left, middle, right):
        axes.legend(fontsize=8)
    _save(figure, path)


def roadmap(path: str | Path, milestones: Sequence[tuple[str, float, float]], quality: str, context: int) -> None:
    """A PNG of the quality and the decode speed behind each stage.

    Args:
        path: of the file.
        milestones: (stage, quality, tokens/s), in their order.
        quality: what it is, in words.
        context: tokens behind which the speeds were measured.
    """
    pyplot = _pyplot()
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True)
    along, values, speeds = range(len(milestones)), [m[1] for m in milestones], [m[2] for m in milestones]
    upper.plot(along, values, marker="o", color="C0")
    for x, value in zip(along, values):
        near = {"textcoords": "offset points", "xytext": (0, 9), "ha": "center", "fontsize": 9}
        upper.annotate(f"{value:.3f}", (x, value), **near, bbox={"color": "white", "pad": 1})
    upper.set(ylabel=quality, title="quality and speed behind each stage")
    upper.margins(0.1, 0.25)
    bars = lower.bar(along, speeds, 0.6, color="0.7", edgecolor="0.3")
    lower.bar_label(bars, [f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}" for speed in speeds], fontsize=9)
    lower.set_xticks(along, [m[0] for m in milestones])
    lower.set(ylabel=f"decode behind {context:,} tokens\n(tokens/s)")
    lower.margins(y=0.15)
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
