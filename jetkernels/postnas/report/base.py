"""The report of a base that was trained here, or taken from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jetkernels.model import JetNemotronForCausalLM

from ..tasks import Score
from .plots import curve
from .tables import markdown_table, provenance, training_speed, write_text


def write_base_report(
    folder: str | Path,
    model: JetNemotronForCausalLM,
    scores: Mapping[str, Score],
    losses: Sequence[float],
    tokens: int | None,
    facts: Sequence[tuple[str, object]],
) -> None:
    """Writes report.md, and loss.png if there was a training.

    Args:
        folder: where they go.
        model: the base.
        scores: {task: its score on held-out text}.
        losses: of the training, by step.
        tokens: that it was trained on; None: it was trained elsewhere.
        facts: (name, value) of what it depends on.
    """
    folder, config = Path(folder), model.config
    text = [
        "# Base model\n",
        f"{config.num_hidden_layers} layers of full attention, width {config.hidden_size}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{'trained elsewhere' if tokens is None else f'trained on {tokens:,} tokens'}.\n",
        "On held-out text, loss in nats per token of the right answer:\n",
        markdown_table(
            ["task", "loss", "accuracy"], [[name, score.loss, score.accuracy] for name, score in scores.items()]
        ),
    ]
    if losses:
        curve(folder / "loss.png", losses, "base: text, recall and copying", "nats per token")
        text.append(f"{training_speed(losses)}\n\n![training](loss.png)\n")
    text += ["## Provenance\n", provenance(facts)]
    write_text(folder / "report.md", "\n".join(text))
