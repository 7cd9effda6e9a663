"""Stage 1: which layers keep full attention, which get a window, which become JetBlocks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from jetkernels._progress import progress
from jetkernels.model import Tokenizer

from .checkpoints import load_state, save_state
from .data import Loader, seeded
from .report import curve, heat_map, markdown_table, provenance, write_text
from .search import Found, beam_search, check_search, importance, most_evaluations, uniform, with_kind
from .super_network import Placement, SuperNetwork
from .tasks import OBJECTIVES, Score, Task, objective_of
from .training import Recipe, ranks, train

STAGE = "super network"


@dataclass(frozen=True)
class PlacementOptions:
    """What is searched for.

    full_layers, window_layers: budgets.  full_task, window_task: names of the tasks whose objective decides each.
    objective: "loss" (minus the loss on the right answer) or "accuracy".  width, exhaustive_up_to: see `beam_search`.
    """

    full_layers: int
    window_layers: int = 0
    full_task: str = "recall"
    window_task: str = "language modelling"
    objective: str = "loss"
    width: int = 4
    exhaustive_up_to: int = 64

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")

    def check(self, layers: int, tasks: Sequence[str]) -> None:
        """Raises ValueError where a search over `layers` layers with these tasks could not end well."""
        check_search(layers, self.full_layers, self.width)
        check_search(layers - self.full_layers, self.window_layers, self.width)
        for task in (self.full_task, *([self.window_task] if self.window_layers else [])):
            if task not in tasks:
                raise ValueError(f"task must be one of {', '.join(tasks)}, got {task!r}")

    def evaluations(self, layers: int, tasks: int) -> int:
        """How often a search asks for a score, at most; repeated questions, which cost nothing, counted too."""
        full = most_evaluations(layers, self.full_layers, self.width, self.exhaustive_up_to) + tasks * (layers + 1)
        free = layers - self.full_layers
        window = most_evaluations(free, self.window_layers, self.width, self.exhaustive_up_to) + tasks * (free + 1)
        return full + (window if self.window_layers else 0)


class ScoreBook:
    """Scores of placements, each computed once and kept in a file, so that a killed search does not repeat them."""

    def __init__(self, network: SuperNetwork, tasks: Sequence[Task], facts: Mapping, path: str | Path | None = None):
        self.network = network
        self.tasks = {task.name: task for task in tasks}
        if len(self.tasks) != len(tasks):
            raise ValueError(f"tasks must have different names, got {[task.name for task in tasks]}")
        self.path = path
        self.run = dict(facts)
        self.scores: dict[str, list] = {}
        if path is not None and Path(path).exists():
            self.scores = load_state(path, "scores", self.run)["scores"]

    def score(self, placement: Placement, task: str) -> Score:
        """The score of a placement, from the file if it is there."""
        if task not in self.tasks:
            raise ValueError(f"task must be one of {', '.join(self.tasks)}, got {task!r}")
        key = f"{task}|{' '.join(placement)}"
        if key not in self.scores:
            device = self.network.base.device
            with torch.no_grad():
                score = self.tasks[task].score(lambda ids: self.network(ids.to(device), placement))
            self.scores[key] = [score.loss, score.accuracy, {name: list(pair) for name, pair in score.groups.items()}]
            if self.path is not None and ranks()[0] == 0:
                save_state(self.path, "scores", self.run, {"scores": self.scores})
        loss, accuracy, groups = self.scores[key]
        return Score(loss, accuracy, {name: tuple(pair) for name, pair in groups.items()})

    def evaluate(self, task: str, objective: str, bar=None) -> Callable[[Placement], float]:
        """Placement -> objective of a task, more is better.  bar: of `progress`, advanced by each evaluation."""

        def value(placement: Placement) -> float:
            result = objective_of(task, self.score(placement, task), objective)
            if bar is not None:
                bar.update()
            return result

        return value


@dataclass(frozen=True)
class PlacementResult:
    """What stage 1 ends with: the placement, both searches, importance {kind: {task: {layer: gain}}}, losses of the
    training.
    """

    placement: Placement
    full: Found
    window: Found | None
    importance: Mapping[str, Mapping[str, Mapping[int, float]]]
    losses: Sequence[float]


def train_super_network(
    network: SuperNetwork,
    loader: Loader,
    recipe: Recipe,
    facts: Mapping,
    checkpoint: str | Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
    placement: Placement | None = None,
) -> list[float]:
    """Trains the JetBlock paths by feature distillation: a random placement per step, or always the given one.

    facts, checkpoint, on_step: see `training.train`. Returns the loss of every step.
    """
    device = network.base.device
    if placement is not None:
        placement = network.check(placement)

    def step_loss(rows, step):
        path = placement or network.random_placement(seeded("path", loader.seed, step))
        return network.distillation_loss(rows[:, :-1].to(device), path)

    used = [i for i in range(network.num_layers) if placement is None or placement[i] == "jet"]
    parameters = {f"{i}.{name}": p for i in used for name, p in network.jet[i].named_parameters()}
    jet = network.jet_config.to_dict() if network.jet_config is not None else type(network.jet[0]).__name__
    described = dict(facts) | {"jet": jet, "base config": network.base.config.to_dict(), "placement": placement}
    if placement is not None and "swa" in placement:
        described["window"] = network.window_size
    return train(STAGE, parameters, step_loss, loader, recipe, described, checkpoint, on_step)


def search_placement(book: ScoreBook, options: PlacementOptions, losses: Sequence[float] = ()) -> PlacementResult:
    """Full-attention layers first, on their task; then, with those fixed, windowed layers on theirs; and importance of
    each.
    """
    layers = book.network.num_layers
    start: Placement = ("jet",) * layers
    settings = {"width": options.width, "exhaustive_up_to": options.exhaustive_up_to}
    options.check(layers, list(book.tasks))
    most = options.evaluations(layers, len(book.tasks))
    with progress(total=most, desc="placements", unit="evaluation", disable=ranks()[0] > 0) as bar:
        full = beam_search(
            start, options.full_layers, book.evaluate(options.full_task, options.objective, bar), **settings
        )
        maps = {"attn": {t: importance(start, book.evaluate(t, options.objective, bar)) for t in book.tasks}}
        window, placement = None, full.placement
        if options.window_layers:
            value = book.evaluate(options.window_task, options.objective, bar)
            window = beam_search(placement, options.window_layers, value, kind="swa", **settings)
            maps["swa"] = {
                t: importance(placement, book.evaluate(t, options.objective, bar), "swa") for t in book.tasks
            }
            placement = window.placement
    return PlacementResult(placement, full, window, maps, list(losses))


def comparison(book: ScoreBook, result: PlacementResult) -> list[tuple[str, Placement]]:
    """Placements that the found one is held against."""
    layers = book.network.num_layers
    rows = [("base, attention everywhere", ("attn",) * layers), ("JetBlock everywhere", ("jet",) * layers)]
    budget = len(result.full.chosen)
    if budget:
        rows.append((f"uniform, {budget} full", with_kind(("jet",) * layers, uniform(layers, budget), "attn")))
        rows.append((f"found, {budget} full", result.full.placement))
    if result.window is not None:
        rows.append((f"found, {budget} full and {len(result.window.chosen)} windowed", result.placement))
    return rows


def _importance_section(folder: Path, result: PlacementResult, layers: int, objective: str) -> str:
    names = {"attn": "full attention", "swa": "sliding-window attention"}
    parts = []
    for kind, maps in result.importance.items():
        rows = [[task, *(gains.get(i, 0.0) for i in range(layers))] for task, gains in maps.items()]
        heat_map(
            folder / f"importance-{kind}.png",
            list(maps),
            [row[1:] for row in rows],
            f"gain from {names[kind]} in one layer",
        )
        shown = [[task, *(gains.get(i, "full") for i in range(layers))] for task, gains in maps.items()]
        what = "minus the loss, nats per token" if objective == "loss" else "accuracy"
        parts.append(
            f"## Importance of {names[kind]} per layer\n\nGain of the objective ({what}) when that layer alone changes from "
            f"JetBlock to {names[kind]}.\n\n{markdown_table(['task', *map(str, range(layers))], shown)}\n"
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
    """report.md, its plots and result.json. The same search gives the same files, whether it was interrupted or not.

    fresh: scores on examples that the search has not seen; the found placement is held against others on these, since
    on the examples by which it was chosen it has an advantage. None: on the examples of the search, and the report says
    so.
    """
    folder = Path(folder)
    judge = book if fresh is None else fresh
    layers = book.network.num_layers
    rows, compared = [], []
    for name, placement in comparison(book, result):
        scores = [judge.score(placement, task) for task in judge.tasks]
        rows.append([name, " ".join(placement), *(v for s in scores for v in (s.loss, s.accuracy))])
        pairs = {task: [score.loss, score.accuracy] for task, score in zip(judge.tasks, scores)}
        compared.append({"name": name, "placement": placement, "scores": pairs})
    header = ["placement", "layers", *(f"{task}, {what}" for task in book.tasks for what in ("loss", "accuracy"))]
    recalled = [
        [name, group, *pair]
        for name, placement in comparison(book, result)
        for task in judge.tasks
        for group, pair in judge.score(placement, task).groups.items()
    ]
    searches = [("full attention", options.full_task, result.full)]
    if result.window is not None:
        searches.append(("sliding window", options.window_task, result.window))
    found = [
        [
            what,
            task,
            ", ".join(map(str, f.chosen)),
            f.value,
            f.evaluated,
            "all there are" if f.exhaustive else f"beam of {options.width}",
        ]
        for what, task, f in searches
    ]
    text = [
        "# Placement of attention layers\n",
        f"Placement: `{' '.join(result.placement)}`\n",
        markdown_table(
            ["layers of", "chosen by task", "layers (0-based)", "objective", "placements evaluated", "search"], found
        ),
        "## Held against\n\nLoss in nats per token of the right answer; all within the super network, JetBlock paths as trained there; on "
        f"{'the examples of the search' if fresh is None else 'generated examples that the search has not seen'}.\n",
        markdown_table(header, rows),
    ]
    if recalled:
        text.append("## Recall by distance\n")
        text.append(markdown_table(["placement", "group", "loss", "accuracy"], recalled))
    text.append(_importance_section(folder, result, layers, options.objective))
    if result.losses:
        curve(
            folder / "distillation.png", result.losses, "super network: feature distillation", "mean squared difference"
        )
        text.append(
            f"## Training of the super network\n\nLast loss {result.losses[-1]:.6f}.\n\n![distillation](distillation.png)\n"
        )
    text.append("## Provenance\n")
    text.append(provenance([*facts, *asdict(options).items()]))
    write_text(folder / "report.md", "\n".join(text))
    values = {
        "placement": result.placement,
        "full": asdict(result.full),
        "window": asdict(result.window) if result.window else None,
        "importance": result.importance,
        "compared": compared,
    }
    write_text(folder / "result.json", json.dumps(values, indent=1) + "\n")


def export(network: SuperNetwork, placement: Placement, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes the model of a placement as the published config.json and safetensors, and the tokenizer, if any."""
    network.extract(placement).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
