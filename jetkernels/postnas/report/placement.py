"""The report of stage 1: the placement that was found, held against others, and the importance of each layer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from ..options import OBJECTIVE_NAMES
from ..placement import PlacementOptions, PlacementResult, ScoreBook
from ..search import Found, by_importance, uniform, with_kind
from ..super_network import Placement, SuperNetwork
from ..tasks import Score, objective_of
from .plots import FEATURE_LOSS, budget_curves, curve, heat_map, placements_tried
from .tables import markdown_table, not_exported, plain_scores, provenance, training_speed, write_text

# The name of a placement, and it; None stands for the base.
Compared = tuple[str, Placement | None]


def placed(
    network: SuperNetwork, result: PlacementResult, options: PlacementOptions, budget: int
) -> list[tuple[str, Placement]]:
    """(how, placement) of so many full layers: at equal distances, those that gain most alone, and the found one."""
    gains = result.importance["attn"][options.full_task]
    layers = {
        "uniform": uniform(network.num_layers, budget),
        "by importance": by_importance(gains, budget),
        "found": result.full.budgets[budget],
    }
    start = ("jet",) * network.num_layers
    return [(how, with_kind(start, chosen, "attn")) for how, chosen in layers.items()]


def comparison(book: ScoreBook, result: PlacementResult, options: PlacementOptions) -> list[Compared]:
    """Placements that the found one is held against."""
    network, layers = book.network, book.network.num_layers
    everywhere = ("attn",) * layers
    rows: list[Compared] = [("base, attention everywhere", None if network.attention else everywhere)]
    if network.attention:
        rows.append(("trained attention everywhere", everywhere))
    rows.append((f"{network.path_name} everywhere", ("jet",) * layers))
    budget = len(result.full.chosen)
    if budget:
        rows += [(f"{how}, {budget} full", one) for how, one in placed(network, result, options, budget)]
    if result.window is not None:
        rows.append((f"found, {budget} full and {len(result.window.chosen)} windowed", result.placement))
    return rows


def _plain(found: Found) -> dict[str, object]:
    """For JSON; of the placements that were looked at, their number."""
    return {name: value for name, value in asdict(found).items() if name != "values"} | {"evaluated": found.evaluated}


def _searches_section(result: PlacementResult, options: PlacementOptions) -> str:
    searches = [("full attention", options.full_task, options.full_objective, result.full)]
    if result.window is not None:
        searches.append(("sliding window", options.window_task, options.window_objective, result.window))
    header = ["layers of", "chosen by", "layers (0-based)", "objective", "placements evaluated", "search"]
    rows = []
    for what, task, objective, found in searches:
        by = f"{task}, {OBJECTIVE_NAMES[objective]}"
        how = "all there are" if found.exhaustive else f"beam of {options.width}"
        rows.append([what, by, ", ".join(map(str, found.chosen)), found.value, found.evaluated, how])
    return markdown_table(header, rows)


def _comparison_section(
    scored: Sequence[tuple[str, Placement | None, Mapping[str, Score]]], path: str, unseen: bool
) -> list[str]:
    """The found placement beside others, and the recall of each by distance.

    Args:
        scored: (name, placement, scores).
        path: what the linear paths are.
        unseen: the search has not seen the examples.
    """
    on = "generated examples that the search has not seen" if unseen else "the examples of the search"
    tasks = list(scored[0][2])
    header = ["placement", "layers", *(f"{task}, {what}" for task in tasks for what in ("loss", "accuracy"))]
    rows = [
        [name, " ".join(placement or ()), *(value for s in of_tasks.values() for value in (s.loss, s.accuracy))]
        for name, placement, of_tasks in scored
    ]
    text = [
        "## Held against\n\nLoss in nats per token of the right answer; all within the super network, "
        f"{path} paths as trained there; on {on}.\n",
        markdown_table(header, rows),
    ]
    recalled = [
        [name, group, *pair]
        for name, _, scores in scored
        for score in scores.values()
        for group, pair in score.groups.items()
    ]
    if recalled:
        text.append("## Recall by distance\n")
        text.append(markdown_table(["placement", "group", "loss", "accuracy"], recalled))
    return text


class OfBudget(NamedTuple):
    """A placement of so many full layers, no windows, and its scores.

    Attributes:
        budget: full layers.
        how: they were placed: "uniform", "by importance" or "found".
        layers: that are full, 0-based.
        scores: {task: score}.
    """

    budget: int
    how: str
    layers: Sequence[int]
    scores: Mapping[str, Score]


def by_budget(judge: ScoreBook, result: PlacementResult, options: PlacementOptions) -> list[OfBudget]:
    """The placements of every budget that was asked for."""
    budgets = [budget for budget in result.full.budgets if budget]
    named = [(budget, *pair) for budget in budgets for pair in placed(judge.network, result, options, budget)]
    scored = scores_of_each(judge, [placement for _, _, placement in named])
    return [
        OfBudget(budget, how, [i for i, kind in enumerate(placement) if kind == "attn"], scores)
        for (budget, how, placement), scores in zip(named, scored)
    ]


def read_budgets(folder: Path) -> list[OfBudget]:
    """What the report of stage 1 in `folder` has of its budgets.

    Raises:
        OSError: there is no result.json.
        ValueError: it has none.
    """
    try:
        rows = json.loads((folder / "result.json").read_text(encoding="utf-8"))["budgets"]
        return [
            OfBudget(
                row["budget"], row["how"], row["layers"], {task: Score(*pair) for task, pair in row["scores"].items()}
            )
            for row in rows
        ]
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"--placement-folder: {folder / 'result.json'} must have scores by budget: run `search placement` again"
        ) from None


def _budget_section(
    folder: Path, rows: Sequence[OfBudget], judge: ScoreBook, result: PlacementResult, options: PlacementOptions
) -> list[str]:
    """A table and a picture of the placements of every budget; nothing where there is only one."""
    if len({row.budget for row in rows}) < 2:
        return []
    network = judge.network
    fixed = comparison(judge, result, options)[0], (f"{network.path_name} everywhere", ("jet",) * network.num_layers)
    panels: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        for title, value in _objectives(row.scores, options).items():
            panels.setdefault(title, {}).setdefault(row.how, {})[row.budget] = value
    levels: dict[str, dict[str, float]] = {title: {} for title in panels}
    for (name, _), of_tasks in zip(fixed, scores_of_each(judge, [placement for _, placement in fixed])):
        for title, value in _objectives(of_tasks, options).items():
            levels[title][name.split(",")[0]] = value
    budget_curves(folder / "budgets.png", panels, levels)
    return [
        "## Budgets of full layers\n\nOne beam found them on its way; by importance are the layers that gain most "
        f"alone in {options.full_task}. No windows; within the super network.\n",
        budget_table(rows),
        "![score against the number of full layers](budgets.png)\n",
    ]


def budget_table(rows: Sequence[OfBudget]) -> str:
    """The scores of placements by their number of full layers."""
    header = ["full layers", "placement", "layers (0-based)"]
    header += [f"{task}, {what}" for task in rows[0].scores for what in ("loss", "accuracy")]
    return markdown_table(
        header,
        [
            [
                *(row.budget, row.how, ", ".join(map(str, row.layers))),
                *(value for s in row.scores.values() for value in (s.loss, s.accuracy)),
            ]
            for row in rows
        ],
    )


def _tried_section(folder: Path, book: ScoreBook, result: PlacementResult, options: PlacementOptions) -> list[str]:
    """A picture of the placements of full layers that the search looked at; nothing where no layer is full."""
    budgets = [budget for budget in result.full.budgets if budget]
    if not budgets:
        return []
    task, objective = options.full_task, options.full_objective
    value, layers = book.evaluate(task, objective), book.network.num_layers
    alone = [(), *((i,) for i in range(layers))]
    values = dict(result.full.values) | {full: value(with_kind(("jet",) * layers, full, "attn")) for full in alone}
    tried = [(len(full), score) for full, score in values.items()]
    marked: dict[str, dict[int, float]] = {}
    for budget in budgets:
        for how, placement in placed(book.network, result, options, budget):
            marked.setdefault(how, {})[budget] = value(placement)
    placements_tried(folder / "tried.png", tried, marked, f"{task}, {OBJECTIVE_NAMES[objective]}")
    return [
        "## Every placement tried\n\nOn the examples of the search, by which the found ones were chosen; with those of "
        "the importance of layers.\n\n![every placement tried](tried.png)\n"
    ]


def _objectives(scores: Mapping[str, Score], options: PlacementOptions) -> dict[str, float]:
    """{task and objective in words: its value}, by the objectives of full attention."""
    chosen = {task: options.objective(task, "attn") for task in scores}
    return {
        f"{task}, {OBJECTIVE_NAMES[objective]}": objective_of(task, scores[task], objective)
        for task, objective in chosen.items()
    }


def scores_of_each(judge: ScoreBook, placements: Sequence[Placement | None]) -> list[dict[str, Score]]:
    """{task: score} of each placement; task by task, so that placements share what they can."""
    found: list[dict[str, Score]] = [{} for _ in placements]
    for task in judge.tasks:
        for scores, placement in zip(found, placements):
            scores[task] = judge.score(placement, task)
    return found


def _importance_section(folder: Path, result: PlacementResult, network: SuperNetwork, options: PlacementOptions) -> str:
    """Tables and heat maps of each layer's gain; the pictures go to `folder`."""
    names = {"attn": "full attention", "swa": "sliding-window attention"}
    layers, path, parts = network.num_layers, network.path_name, []
    for kind, maps in result.importance.items():
        labels = {task: f"{task}, {OBJECTIVE_NAMES[options.objective(task, kind)]}" for task in maps}
        drawn = [[gains.get(i, math.nan) for i in range(layers)] for gains in maps.values()]
        picture = folder / f"importance-{kind}.png"
        label = "gain of the objective"
        heat_map(picture, list(labels.values()), drawn, f"gain from {names[kind]} in one layer", label)
        shown = [[labels[task], *(gains.get(i, "full") for i in range(layers))] for task, gains in maps.items()]
        table = markdown_table(["task", *map(str, range(layers))], shown)
        parts.append(
            f"## Importance of {names[kind]} per layer\n\nGain of the objective (losses in nats per token) when that "
            f"layer alone changes from {path} to {names[kind]}.\n\n{table}\n"
            f"![importance](importance-{kind}.png)\n"
        )
    return "\n".join(parts)


def write_report(
    folder: str | Path,
    book: ScoreBook,
    result: PlacementResult,
    options: PlacementOptions,
    facts: Sequence[tuple[str, object]],
    fresh: ScoreBook | None = None,
) -> None:
    """Writes report.md, its plots and result.json.

    The same search gives the same files, whether it was interrupted or not, but for the tokens per second.

    Args:
        folder: where they go.
        book: scores of the search.
        result: what the search found.
        options: what it was asked for.
        facts: (name, value) of what it depends on.
        fresh: scores on examples that the search has not seen; the found placement is held against others on these,
            since on the examples by which it was chosen it has an advantage. None: on the examples of the search, and
            the report says so.
    """
    folder = Path(folder)
    judge = book if fresh is None else fresh
    compared = comparison(book, result, options)
    of_each = scores_of_each(judge, [placement for _, placement in compared])
    scored = [(name, placement, scores) for (name, placement), scores in zip(compared, of_each)]
    budgets = by_budget(judge, result, options)
    text = [
        "# Placement of attention layers\n",
        f"Placement: `{' '.join(result.placement)}`\n",
        *([] if book.network.jet_config else [f"{not_exported(book.network.path_name)}\n"]),
        _searches_section(result, options),
        *_comparison_section(scored, book.network.path_name, unseen=fresh is not None),
        *_budget_section(folder, budgets, judge, result, options),
        *_tried_section(folder, book, result, options),
        _importance_section(folder, result, book.network, options),
    ]
    if result.losses:
        picture = "distillation.png"
        curve(folder / picture, result.losses, "super network: feature distillation", FEATURE_LOSS)
        text.append(
            f"## Training of the super network\n\nLast loss {result.losses[-1]:.6f}. {training_speed(result.losses)}"
            f"\n\n![distillation]({picture})\n"
        )
    text += ["## Provenance\n", provenance([*facts, *asdict(options).items()])]
    write_text(folder / "report.md", "\n".join(text))
    values = {
        "placement": result.placement,
        "full": _plain(result.full),
        "window": _plain(result.window) if result.window else None,
        "importance": result.importance,
        "compared": [
            {
                "name": name,
                "placement": placement,
                "scores": plain_scores(scores),
            }
            for name, placement, scores in scored
        ],
        "budgets": [row._asdict() | {"scores": plain_scores(row.scores)} for row in budgets],
    }
    write_text(folder / "result.json", json.dumps(values, indent=1) + "\n")
