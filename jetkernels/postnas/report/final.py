"""The report of stage 5: the hybrid before and after its final training, beside the base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from jetkernels._machine import processor_name

from ..completions import NEW_TOKENS, Completion
from ..final import AFTER, BASE, BEFORE, TEXT, Outcome
from ..power_law import PowerLaw, fit_power_law
from .placement import OfBudget, budget_table
from .plots import budget_curves, curve, held_out_curve
from .tables import (
    file_table,
    markdown_table,
    not_exported,
    plain_scores,
    provenance,
    quoted,
    training_speed,
    write_text,
)

COMPLETIONS = (
    f"## Completions\n\nAt most {NEW_TOKENS} tokens, the most likely one each time, in fp32; all prompts that were "
    "tried, windows of the held-out text last. A line's end is \u21b5.\n"
)
NEAR = 0.5  # nats above the base's loss on held-out text: what the training is asked to reach


def distance_sentence(curve: Sequence[tuple[int, float]], base: float, law: PowerLaw | None) -> str:
    """How far the loss on held-out text is from the base's, and where it would go.

    Args:
        curve: (tokens, loss).
        base: its loss.
        law: fitted to the distances.
    """
    tokens, loss = curve[-1]
    said = f"After {tokens:,} tokens the loss is {loss - base:+.4f} nats from the base's {base:.4f}"
    reached = next((at for at, value in curve if value - base <= NEAR), None)
    if loss - base <= NEAR and reached is not None:
        where = f"first measured within it after {reached:,} tokens" if reached else "within it from the start"
        return f"{said}, within {NEAR} nats ({where}).\n"
    if reached is None:
        said += f"; {NEAR} nats are not reached."
    else:
        when = f"after {reached:,} tokens" if reached else "at the start"
        said += f", no longer within {NEAR} nats, where it was {when}."
    if law is None:
        return f"{said} No power law is fitted: the distances do not fall, or are too few.\n"
    return (
        f"{said} Extrapolation, not a measurement: the power law {law.scale:.3g} * tokens^-{law.exponent:.3g}, fitted "
        f"to the {law.points} distances behind the start (standard deviation of ln(distance) {law.error:.2g}), comes "
        f"to {NEAR} nats after {law.tokens(NEAR):.2g} tokens. It takes the base's loss for the limit, and knows "
        "nothing of the learning rate, which falls within each part.\n"
    )


def _score_table(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """scores: {model: {task: (loss, accuracy)}}."""
    header = ["model", *(f"{task}, {what}" for task in scores[BASE] for what in ("loss", "accuracy"))]
    return markdown_table(
        header, [[name, *(value for pair in of.values() for value in pair)] for name, of in scores.items()]
    )


def _speed_section(outcome: Outcome) -> str:
    base_speed, base_cache = outcome.speeds[BASE]
    rows = [
        [name, f"{speed:,.1f}", f"{cache:,}", f"{speed / base_speed:.2f}", f"{base_cache / cache:.2f}"]
        for name, (speed, cache) in outcome.speeds.items()
    ]
    header = ["model", "decode (tokens/s)", "cache (bytes)", "times the base's tokens/s", "base's cache over its own"]
    machine = [processor_name(), f"{torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        machine.append(torch.cuda.get_device_name())
    return (
        f"## Behind {outcome.context:,} tokens\n\nOne sequence, fp32; the cache is preset, not read; medians of steps. "
        f"Machine: {', '.join(machine)}.\n\n{markdown_table(header, rows)}"
    )


def _budget_section(folder: Path, outcome: Outcome, budgets: Sequence[OfBudget]) -> list[str]:
    """The hybrid against stage 1's placements, by the number of full layers; nothing where these are not known."""
    if not budgets:
        return []
    full = outcome.layer_types.count("attn")
    shown = {
        "recall, loss": ("recall", "loss"),
        "recall, accuracy": ("recall", "accuracy"),
        f"{TEXT}, loss": (TEXT, "loss"),
    }
    panels: dict[str, dict[str, dict[int, float]]] = {title: {} for title in shown}
    for title, (task, what) in shown.items():
        for row in budgets:
            panels[title].setdefault(row.how, {})[row.budget] = getattr(row.scores[task], what)
        for name in (BEFORE, AFTER):
            panels[title][name] = {full: getattr(outcome.scores[name][task], what)}
    levels = {title: {BASE: getattr(outcome.scores[BASE][task], what)} for title, (task, what) in shown.items()}
    budget_curves(folder / "budgets.png", panels, levels)
    return [
        f"## Against the budget of full layers\n\nStage 1's placements within its super network, on the same "
        f"examples; of this hybrid {full} of {len(outcome.layer_types)} layers are full.\n",
        budget_table(budgets),
        "![scores against the number of full layers](budgets.png)\n",
    ]


def completion_table(completions: Sequence[Completion]) -> str:
    """Prompts, and both models' text behind them."""
    return markdown_table(["prompt", "base", "hybrid"], [list(map(quoted, each)) for each in completions])


def write_final_report(
    folder: str | Path, outcome: Outcome, budgets: Sequence[OfBudget], facts: Sequence[tuple[str, object]]
) -> None:
    """Writes report.md, result.json and the plots.

    Args:
        folder: where they go.
        outcome: of the stage.
        budgets: stage 1's placements by their number of full layers; none: not compared.
        facts: (name, value) of what the training depends on.
    """
    folder, linear, scores = Path(folder), outcome.linear, outcome.scores
    plain = {name: plain_scores(of) for name, of in scores.items()}
    said = "" if linear is None else f" The linear ones are {linear}. {not_exported(linear)}"
    points, base = outcome.curve, scores[BASE][TEXT].loss
    near = points[-1][1] - base <= NEAR
    law = None if near else fit_power_law([(tokens, loss - base) for tokens, loss in points])
    held_out_curve(folder / "held-out.png", points, base, NEAR, law, outcome.losses[0].all_tokens)
    distance, speed = distance_sentence(points, base, law), _speed_section(outcome)
    text = [
        "# Final training\n",
        f"Layers: `{' '.join(outcome.layer_types)}`.{said}\n",
        "On examples that the search has not seen, loss in nats per token of the right answer:\n",
        _score_table(plain),
        "## Loss on held-out text over tokens\n",
        distance,
        markdown_table(["tokens", "loss", "from the base"], [[f"{n:,}", loss, loss - base] for n, loss in points]),
        "![loss on held-out text](held-out.png)\n",
        *_budget_section(folder, outcome, budgets),
        speed,
        COMPLETIONS,
        completion_table(outcome.completions),
        "## Training\n",
    ]
    labels = ("KL to the base, nats", "nats per token")
    for name, part, label in zip(("distillation", "whole"), outcome.losses, labels):
        if part:
            curve(folder / f"{name}.png", part, name, label)
            text.append(f"{name}: {training_speed(part)}\n\n![{name}]({name}.png)\n")
    text += ["## Files of the hybrid\n", file_table(outcome.files), "## Provenance\n", provenance(facts)]
    write_text(folder / "report.md", "\n".join(text))
    values = {
        "scores": plain,
        "held out": points,
        "distance": distance,
        "speed": speed,
        "completions": outcome.completions,
    }
    write_text(folder / "result.json", json.dumps(values, indent=1) + "\n")


def summary(folder: Path) -> list[str]:
    """What `write_final_report` wrote to `folder` of base and hybrid side by side, for the report over all stages."""
    values = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return [
        "## The hybrid beside its base\n",
        _score_table(values["scores"]),
        values["distance"],
        values["speed"],
        COMPLETIONS,
        completion_table([Completion(*each) for each in values["completions"]]),
    ]
