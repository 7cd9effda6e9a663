"""The reports of stages 2 to 4: blocks, designs and sizes of the JetBlock, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..candidates import SPEEDS, Measured, over_seeds, spread
from ..shapes import Shape
from .plots import pair_chart, quality_against_speed
from .tables import markdown_table, provenance, write_text


def spread_sentence(rows: Sequence[Measured]) -> str:
    """How far the quality of one candidate is from seed to seed, in words; rows: every seed of every candidate."""
    deviation = spread(rows)
    if deviation is None:
        return (
            "One seed per candidate: how far the quality of one candidate moves from seed to seed was not measured.\n"
        )
    seeds = len({row.seed for row in rows})
    return (
        f"Means over {seeds} seeds (initial values and training rows). The quality of one candidate moves from seed to "
        f"seed by {deviation:.4f} (standard deviation, pooled over the candidates), so the standard error of a "
        f"difference between two rows, taken as independent, is {deviation * math.sqrt(2 / seeds):.4f}; differences of "
        "less than twice that show nothing.\n"
    )


def best_exported(best: str, exported: str | None) -> str:
    """What to add where the best candidate is none that a model can be exported with; else nothing."""
    if exported == best:
        return ""
    return f" (no model can be exported with it; best of those that can: {exported or 'none'})"


def _task_columns(row: Measured) -> list[str]:
    return [f"{task}, {what}" for task in row.scores for what in ("loss", "accuracy")]


def _task_values(row: Measured) -> list[float]:
    return [value for pair in row.scores.values() for value in pair]


def candidate_table(rows: Sequence[Measured]) -> str:
    """Quality and speed as Markdown; rows: one per candidate."""
    header = [
        *("candidate", "parameters of a block", "state of a layer", "cache (KiB)"),
        *("training (tokens/s)", "prefill (tokens/s)", "generation (tokens/s)", *_task_columns(rows[0])),
    ]
    lines = [
        [
            *(row.name, f"{row.parameters:,}", f"{row.state:,}", f"{row.cache_bytes / 1024:.1f}"),
            *(f"{getattr(row, speed):,.1f}" for speed in SPEEDS),
            *_task_values(row),
        ]
        for row in rows
    ]
    return markdown_table(header, lines)


def _pair_section(folder: Path, rows: Sequence[Measured], pair: tuple[str, str]) -> str:
    """Two candidates against each other, every seed of both; the picture goes to `folder`."""
    first, second = ([row for row in rows if row.name == name] for name in pair)

    accuracies = {
        task: tuple([row.scores[task][1] for row in rows] for rows in (first, second)) for task in first[0].scores
    }
    speeds = {
        speed.removesuffix("_per_second"): tuple([getattr(row, speed) for row in rows] for rows in (first, second))
        for speed in SPEEDS
    }
    pair_chart(folder / "pair.png", pair, (first[0].losses, second[0].losses), accuracies, speeds)
    return f"## {pair[0]} against {pair[1]}\n\n![{pair[0]} against {pair[1]}](pair.png)\n"


def _points(rows: Sequence[Measured]) -> list[tuple[str, float, list[float]]]:
    """(name, tokens/s, quality of every seed) of every candidate, for its picture."""
    return [
        (mean.name, mean.generation_per_second, [row.quality for row in rows if row.name == mean.name])
        for mean in over_seeds(rows)
    ]


def write_candidate_report(
    folder: str | Path,
    title: str,
    rows: Sequence[Measured],
    best: Measured,
    exported: str | None,
    pair: tuple[str, str] | None,
    quality: str,
    facts: Sequence[tuple[str, object]],
) -> None:
    """Writes report.md and its plots.

    candidates.png has the training losses, and quality against generation speed; pair.png, if both were measured, two
    candidates against each other.

    Args:
        folder: where they go.
        title: of the report.
        rows: every seed of every candidate.
        best: the candidate that was chosen.
        exported: name of the best of those that a model can be exported with; None: there is none.
        pair: names of two candidates that are compared on their own.
        quality: what it is, in words.
        facts: (name, value) of what the rows depend on.
    """
    folder = Path(folder)
    means = over_seeds(rows)
    curves = {row.name: row.losses for row in means if row.losses}
    quality_against_speed(folder / "candidates.png", _points(rows), quality, curves)
    text = [
        f"# {title}\n",
        f"Best: {best.name}, {quality} {best.quality:.4f}{best_exported(best.name, exported)}. Same placement, text "
        "and recipe for all; speeds on this machine.\n",
        spread_sentence(rows),
        candidate_table(means),
        "![candidates](candidates.png)\n",
    ]
    if pair is not None and {*pair} <= {row.name for row in rows}:
        text.append(_pair_section(folder, rows, pair))
    text += ["## Provenance\n", provenance(facts)]
    write_text(folder / "report.md", "\n".join(text))


def write_shape_report(
    folder: str | Path,
    rows: Sequence[Measured],
    best: Measured,
    path: str,
    minimum: float,
    quality: str,
    facts: Sequence[tuple[str, object]],
    level: tuple[str, float] | None = None,
) -> None:
    """Writes report.md with the grid as a table of the form of the paper's Table 2, and shapes.png.

    Args:
        folder: where they go.
        rows: every seed of every shape; a row's name is that of its shape.
        best: the shape that was chosen.
        path: what was given these shapes.
        minimum: tokens per second that a shape must generate.
        quality: what it is, in words.
        facts: (name, value) of what the rows depend on.
        level: (name, quality) of what the shapes are compared with; a line in the picture.
    """
    means = over_seeds(rows)
    header = ["K", "V", "H", "parameters of a block", "cache (KiB)", "generation (tokens/s)", "fast enough", "chosen"]
    table = [
        [
            *Shape.from_name(row.name),
            f"{row.parameters:,}",
            f"{row.cache_bytes / 1024:.1f}",
            f"{row.generation_per_second:,.1f}",
            "yes" if row.generation_per_second >= minimum else "no",
            "**yes**" if row.name == best.name else "",
            *_task_values(row),
        ]
        for row in means
    ]
    chosen = Shape.from_name(best.name)
    text = [
        f"# Sizes of the {path}\n",
        f"Chosen: K = {chosen.K}, V = {chosen.V}, H = {chosen.H}: the best quality among the shapes that generate at "
        f"least {minimum:,.1f} tokens/s on this machine. Every shape has {chosen.state:,} elements of state per "
        "layer.\n",
        spread_sentence(rows),
        markdown_table([*header, *_task_columns(rows[0])], table),
        *([] if level is None else [f"The line in the picture is {level[0]}: {quality} {level[1]:.4f}.\n"]),
        "![shapes](shapes.png)\n",
        "## Provenance\n",
        provenance(facts),
    ]
    quality_against_speed(Path(folder) / "shapes.png", _points(rows), quality, minimum=minimum, level=level)
    write_text(Path(folder) / "report.md", "\n".join(text))
