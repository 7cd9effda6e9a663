"""Reports of stages 2 and 3: linear blocks, and designs of the JetBlock, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .candidates import Measured, candidate_table
from .report import provenance, quality_against_speed, write_text


def write_candidate_report(
    folder: str | Path, title: str, rows: Sequence[Measured], against: Sequence[str], quality: str, facts: Sequence[tuple[str, object]]
) -> Measured:
    """report.md with the table, and candidates.png: training loss of the candidates `against`, quality against generation speed.

    quality: what it is, in words.  Returns the row of the best quality; ties go to the faster one.
    """
    folder = Path(folder)
    best = max(rows, key=lambda row: (row.quality, row.generation_per_second))
    curves = {row.name: row.losses for row in rows if row.name in against and row.losses}
    points = [(row.name, row.generation_per_second, row.quality) for row in rows]
    quality_against_speed(folder / "candidates.png", curves, points, quality)
    text = [
        f"# {title}\n",
        f"Best: {best.name} ({quality} {best.quality:.4f}). Same placement, text, recipe and seed for all; speeds on this machine.\n",
        candidate_table(rows),
        "![candidates](candidates.png)\n",
        "## Provenance\n",
        provenance(facts),
    ]
    write_text(folder / "report.md", "\n".join(text))
    return best
