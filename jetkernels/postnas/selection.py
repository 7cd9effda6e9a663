"""Reports of stages 2 and 3: linear blocks, and designs of the JetBlock, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .candidates import SPEEDS, Measured, candidate_table, over_seeds, spread_sentence
from .report import pair_chart, provenance, quality_against_speed, write_text


def write_candidate_report(
    folder: str | Path,
    title: str,
    rows: Sequence[Measured],
    pair: tuple[str, str] | None,
    quality: str,
    facts: Sequence[tuple[str, object]],
) -> Measured:
    """report.md with the table over the seeds; candidates.png: training losses, and quality against generation speed;
    and pair.png, the two candidates `pair` against each other, if both were measured.

    rows: every seed of every candidate.  quality: what it is, in words.
    Returns the row (over seeds) of the best quality; ties go to the faster one.
    """
    folder = Path(folder)
    means = over_seeds(rows)
    best = max(means, key=lambda row: (row.quality, row.generation_per_second))
    curves = {row.name: row.losses for row in means if row.losses}
    points = [(row.name, row.generation_per_second, row.quality) for row in means]
    quality_against_speed(folder / "candidates.png", points, quality, curves)
    text = [
        f"# {title}\n",
        f"Best: {best.name} ({quality} {best.quality:.4f}). Same placement, text and recipe for all; speeds on this machine.\n",
        spread_sentence(rows),
        candidate_table(means),
        "![candidates](candidates.png)\n",
    ]
    both = [row for name in pair or () for row in means if row.name == name]
    if len(both) == 2:
        first, second = both
        accuracies = {task: (first.scores[task][1], second.scores[task][1]) for task in first.scores}
        speeds = {
            field.removesuffix("_per_second"): (getattr(first, field), getattr(second, field)) for field in SPEEDS
        }
        pair_chart(folder / "pair.png", (first.name, second.name), (first.losses, second.losses), accuracies, speeds)
        text.append(f"## {first.name} against {second.name}\n\n![{first.name} against {second.name}](pair.png)\n")
    text += ["## Provenance\n", provenance(facts)]
    write_text(folder / "report.md", "\n".join(text))
    return best
