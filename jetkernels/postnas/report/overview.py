"""The report over all stages: what each found, how long it took, and how far a search of this size reaches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jetkernels.model import JetNemotronForCausalLM

from ..costs import Cost
from ..roadmap import Milestone
from .final import summary
from .plots import roadmap
from .tables import markdown_table, provenance, write_text

PAPER_TOKENS = 50e9  # of the paper's training with frozen MLPs and a distillation loss (docs/postnas.md)


class StageDone(NamedTuple):
    """A stage that is done.

    Attributes:
        name: its folder's name.
        found: in a sentence.
        seconds: of the run that finished it.
        cost: of its trainings.
    """

    name: str
    found: str
    seconds: float
    cost: Cost


def _spent(cost: Cost) -> list[str]:
    return [f"{cost.tokens:,}", f"{cost.seconds:,.1f}", f"{cost.tokens_per_second:,.0f}"]


def _roadmap_section(folder: Path, milestones: Sequence[Milestone], quality: str, context: int) -> list[str]:
    points = [(each.stage, each.quality, each.tokens_per_second) for each in milestones]
    roadmap(folder / "roadmap.png", points, quality, context)
    rows = [[each.stage, each.what, each.quality, f"{each.tokens_per_second:,.1f}"] for each in milestones]
    return [
        "## The way\n",
        markdown_table(["behind", "model", quality, f"decode behind {context:,} tokens (tokens/s)"], rows),
        "Qualities are on the examples by which candidates were compared, those of blocks, design and shapes means "
        "over their seeds. All speeds were measured for this report: one sequence, fp32, the cache preset. "
        "Behind stage 1 there is a row only where its model could be exported.\n",
        "![quality and speed behind each stage](roadmap.png)\n",
    ]


def write_overview(
    folder: str | Path,
    base: JetNemotronForCausalLM,
    stages: Sequence[StageDone],
    tokens: int,
    seeds: int,
    milestones: Sequence[Milestone],
    quality: str,
    context: int,
    facts: Sequence[tuple[str, object]],
) -> None:
    """Writes report.md over all stages.

    Args:
        folder: that holds the folders of the stages, that of the final one among them.
        base: that was searched.
        stages: in their order.
        tokens: that each candidate is trained on.
        seeds: of each candidate.
        milestones: models on the way, in their order.
        quality: what theirs is, in words.
        context: tokens behind which they were timed.
        facts: (name, value) of what the results depend on.
    """
    parameters, layers = sum(p.numel() for p in base.parameters()), base.config.num_hidden_layers
    minutes = [stage.seconds / 60 for stage in stages]
    rows = [
        [f"[{stage.name}]({stage.name}/report.md)", stage.found, f"{spent:.1f}", *_spent(stage.cost)]
        for stage, spent in zip(stages, minutes)
    ]
    whole = Cost(sum(stage.cost.tokens for stage in stages), sum(stage.cost.seconds for stage in stages))
    header = ["stage", "found", "minutes", "tokens trained on", "seconds of training", "tokens/s"]
    text = [
        "# From a full-attention model to a Jet hybrid\n",
        markdown_table(header, [*rows, ["all", "", f"{sum(minutes):.1f}", *_spent(whole)]]),
        "Minutes are those of the command that wrote this report; of a stage that was resumed, only what was left to "
        "do. Tokens and seconds of training are those of all its trainings, before and after it was resumed.\n",
        *_roadmap_section(Path(folder), milestones, quality, context),
        *summary(Path(folder) / "final"),
        "## What a search of this size shows\n",
        f"The base has {parameters:,} parameters in {layers} layers. Every candidate was trained on {tokens:,} "
        f"tokens, {tokens / PAPER_TOKENS:.0e} of those of the paper's distillation, with "
        f"{seeds} seed{'s' if seeds > 1 else ''} each.\n",
        "It can show:\n",
        "- which layers of *this* base carry recall, copying and text, and whether the search finds them;",
        "- differences between candidates that exceed twice the standard error given above each table;",
        "- what each block costs in parameters, state and cache, and how fast it runs in this library on this machine;",
        "- that the steps fit together: the exported model is the one that was searched.\n",
        "It cannot show:\n",
        "- which placement, block, design or shape is best in a model of billions of parameters. Blocks that learn "
        "fast are favoured over blocks that end better, since every training stops after minutes;",
        "- anything about long contexts: rows are short beside the state, and the full attention of "
        f"{layers} layers costs little;",
        "- the speed of the blocks elsewhere: DeltaNet, Gated DeltaNet and JetBlock run on this library's ops, the "
        "others on plain PyTorch;",
        "- how results move with the base: it is one model with one seed.\n",
        "## Provenance\n",
        provenance(facts),
    ]
    write_text(Path(folder) / "report.md", "\n".join(text))
