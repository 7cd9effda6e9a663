"""The report of stage 5: the hybrid before and after its final training, beside the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..tasks import Score
from .plots import curve
from .tables import markdown_table, not_exported, provenance, training_speed, write_text


def write_final_report(
    folder: str | Path,
    layer_types: Sequence[str],
    linear: str | None,
    tasks: Sequence[str],
    scores: Mapping[str, Sequence[Score]],
    losses: tuple[Sequence[float], Sequence[float]],
    facts: Sequence[tuple[str, object]],
) -> None:
    """Writes report.md and the curves of both trainings.

    Args:
        folder: where they go.
        layer_types: of the hybrid.
        linear: what its linear layers are, where no model can be exported with it; else None.
        tasks: their names.
        scores: {model: its score in each task}.
        losses: of the distillation and of the training of the whole model, by step.
        facts: (name, value) of what the training depends on.
    """
    folder = Path(folder)
    header = ["model", *(f"{task}, {what}" for task in tasks for what in ("loss", "accuracy"))]
    rows = [[name, *(value for s in found for value in (s.loss, s.accuracy))] for name, found in scores.items()]
    said = "" if linear is None else f" The linear ones are {linear}. {not_exported(linear)}"
    text = ["# Final training\n", f"Layers: `{' '.join(layer_types)}`.{said}\n", markdown_table(header, rows)]
    labels = ("KL to the base, nats", "nats per token")
    for name, part, label in zip(("distillation", "whole"), losses, labels):
        if part:
            curve(folder / f"{name}.png", part, name, label)
            text.append(f"{name}: {training_speed(part)}\n\n![{name}]({name}.png)\n")
    write_text(folder / "report.md", "\n".join([*text, "## Provenance\n", provenance(facts)]))
