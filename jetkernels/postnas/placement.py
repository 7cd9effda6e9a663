"""Stage 1: which layers keep full attention, which get a window, which become JetBlocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jetkernels._progress import progress
from jetkernels.model import Tokenizer

from .checkpoints import load_state, save_state
from .data import Loader, seeded
from .prefixes import Prefixes
from .search import Found, beam_search, check_search, importance, most_evaluations
from .super_network import Placement, SuperNetwork
from .tasks import OBJECTIVES, Score, Task, objective_of
from .training import Losses, Recipe, Training, ranks, train_together

STAGE = "super network"


@dataclass(frozen=True)
class PlacementOptions:
    """What is searched for.

    Attributes:
        full_layers: budget of layers with full attention.
        window_layers: budget of layers with sliding-window attention.
        full_task: name of the task whose objective places full attention.
        window_task: name of the one that places windows.
        full_objective: what of the first one's score counts: "loss" (minus the loss on the right answer) or "accuracy".
        window_objective: the same of the second one.
        width: of the beam (`beam_search`).
        exhaustive_up_to: placements that are all looked at (`beam_search`).
        budgets: other numbers of full layers for which the best placement is looked for, on the way.
    """

    full_layers: int
    window_layers: int = 0
    full_task: str = "recall"
    window_task: str = "language modelling"
    full_objective: str = "loss"
    window_objective: str = "loss"
    width: int = 4
    exhaustive_up_to: int = 64
    budgets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("full_objective", "window_objective"):
            if getattr(self, name) not in OBJECTIVES:
                raise ValueError(f"{name} must be one of {', '.join(OBJECTIVES)}, got {getattr(self, name)!r}")

    def objective(self, task: str, kind: str) -> str:
        """The objective by which the importance of layers of a kind, "attn" or "swa", is measured in a task.

        That of the search on this task, whichever layers it places; of other tasks, and of one that both searches are
        on, that of the search for this kind.
        """
        own = self.full_objective if kind == "attn" else self.window_objective
        searches = {self.full_task: self.full_objective, self.window_task: self.window_objective}
        return own if self.full_task == self.window_task else searches.get(task, own)

    def check(self, layers: int, tasks: Sequence[str]) -> None:
        """Refuses what a search over `layers` layers with these tasks could not end well with.

        Raises:
            ValueError: a budget or the width does not fit, or a task is not among `tasks`.
        """
        for budget in (self.full_layers, *self.budgets):
            check_search(layers, budget, self.width)
        check_search(layers - self.full_layers, self.window_layers, self.width)
        for task in (self.full_task, *([self.window_task] if self.window_layers else [])):
            if task not in tasks:
                raise ValueError(f"task must be one of {', '.join(tasks)}, got {task!r}")

    def evaluations(self, layers: int, tasks: int) -> int:
        """How often a search asks for a score, at most; repeated questions, which cost nothing, counted too."""
        budgets, limits = (self.full_layers, *self.budgets), (self.width, self.exhaustive_up_to)
        full = most_evaluations(layers, budgets, *limits) + tasks * (layers + 1)
        free = layers - self.full_layers
        window = most_evaluations(free, [self.window_layers], *limits) + tasks * (free + 1)
        return full + (window if self.window_layers else 0)


class ScoreBook:
    """Scores of placements, each computed once and kept in a file, so that a killed search does not repeat them.

    Args:
        network: whose placements are scored.
        tasks: what they are scored by.
        facts: JSON values that the scores depend on; a file of other ones is refused.
        path: of the file; None: none.
    """

    def __init__(self, network: SuperNetwork, tasks: Sequence[Task], facts: Mapping, path: str | Path | None = None):
        self.network = network
        self.tasks = {task.name: task for task in tasks}
        if len(self.tasks) != len(tasks):
            raise ValueError(f"tasks must have different names, got {[task.name for task in tasks]}")
        self.path = path
        self.run = dict(facts)
        self.scores: dict[str, list] = {}
        self.prefixes: dict[str, Prefixes] = {}  # of the task that was scored last
        if path is not None and Path(path).exists():
            self.scores = load_state(path, "scores", self.run)["scores"]

    def score(self, placement: Placement | None, task: str) -> Score:
        """The score of a placement, from the file if it is there; None: of the base."""
        if task not in self.tasks:
            raise ValueError(f"task must be one of {', '.join(self.tasks)}, got {task!r}")
        key = f"{task}|{' '.join(placement or ['base'])}"
        if key not in self.scores:
            score = self._computed(placement, task)
            self.scores[key] = [score.loss, score.accuracy, {name: list(pair) for name, pair in score.groups.items()}]
            if self.path is not None and ranks()[0] == 0:
                save_state(self.path, "scores", self.run, {"scores": self.scores})
        loss, accuracy, groups = self.scores[key]
        return Score(loss, accuracy, {name: tuple(pair) for name, pair in groups.items()})

    def _computed(self, placement: Placement | None, task: str) -> Score:
        network, device = self.network, self.network.base.device
        if placement is None:
            with torch.no_grad():
                return self.tasks[task].score(lambda ids: network(ids.to(device), None))
        placement = network.check(placement)
        if task not in self.prefixes:
            self.prefixes = {task: Prefixes(network)}
        prefixes = self.prefixes[task]
        return self.tasks[task].score(lambda ids: prefixes.logits(ids.to(device), placement))

    def evaluate(self, task: str, objective: str, bar: Any = None) -> Callable[[Placement], float]:
        """Placement -> objective of a task, more is better; `bar`, one of `progress`, advances with each."""

        def value(placement: Placement) -> float:
            result = objective_of(task, self.score(placement, task), objective)
            if bar is not None:
                bar.update()
            return result

        return value


@dataclass(frozen=True)
class PlacementResult:
    """What stage 1 ends with.

    Attributes:
        placement: that was found.
        full: the search for layers with full attention.
        window: the search for layers with a window; None if there was none.
        importance: {kind: {task: {layer: gain}}}.
        losses: of the training of the super network, by step.
    """

    placement: Placement
    full: Found
    window: Found | None
    importance: Mapping[str, Mapping[str, Mapping[int, float]]]
    losses: Sequence[float]


def super_network_training(
    network: SuperNetwork,
    loader: Loader,
    recipe: Recipe,
    facts: Mapping,
    checkpoint: str | Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
    placement: Placement | None = None,
    layer_steps: int = 0,
) -> Training:
    """What `train_super_network` runs."""
    device = network.base.device
    if placement is not None:
        placement = network.check_distilled(placement)

    def step_loss(rows: Tensor, step: int) -> Tensor | Iterator[Tensor]:
        input_ids = rows[:, :-1].to(device)
        if step < layer_steps:
            return network.layer_losses(input_ids, placement)
        path = placement or network.random_placement(seeded("path", loader.seed, step))
        return network.distillation_loss(input_ids, path)

    parameters = network.path_parameters(placement)
    jet = network.jet_config.to_dict() if network.jet_config is not None else network.path_name
    described = dict(facts) | {"jet": jet, "base config": network.base.config.to_dict(), "placement": placement}
    described |= {"precision": network.teacher.precision, "layer_steps": layer_steps}
    if placement is not None and "swa" in placement:
        described["window"] = network.window_size
    return Training(STAGE, parameters, step_loss, loader, recipe, described, checkpoint, on_step)


def train_super_network(
    network: SuperNetwork,
    loader: Loader,
    recipe: Recipe,
    facts: Mapping,
    checkpoint: str | Path | None = None,
    on_step: Callable[[int, float], None] | None = None,
    placement: Placement | None = None,
    layer_steps: int = 0,
) -> Losses:
    """Trains the paths by feature distillation and returns the loss of every step.

    Args:
        network: whose paths are trained, in place.
        loader: of the training rows.
        recipe: steps, learning rate and the like.
        facts: JSON values that the result depends on.
        checkpoint: file to resume from and to write to (`training.train`).
        on_step: called after each step with its number and loss.
        placement: trained in every step; None: a random one per step.
        layer_steps: of the steps, the first so many are layer by layer (`SuperNetwork.layer_losses`), and of every
            linear path where there is no placement.
    """
    training = super_network_training(network, loader, recipe, facts, checkpoint, on_step, placement, layer_steps)
    train_together([training])
    return training.losses


def search_placement(book: ScoreBook, options: PlacementOptions, losses: Sequence[float] = ()) -> PlacementResult:
    """Finds the full-attention layers, on their task; then, with those fixed, windowed layers on theirs.

    Args:
        book: scores of the trained super network.
        options: budgets, tasks and the like.
        losses: of its training, which the result names.

    Returns:
        The placement, both searches, and the importance of each layer.
    """
    layers = book.network.num_layers
    start: Placement = ("jet",) * layers
    search = partial(beam_search, width=options.width, exhaustive_up_to=options.exhaustive_up_to)
    options.check(layers, list(book.tasks))
    most = options.evaluations(layers, len(book.tasks))
    with progress(total=most, desc="placements", unit="evaluation", disable=ranks()[0] > 0) as bar:

        def map_of(kind: str, before: Placement) -> dict[str, dict[int, float]]:
            """{task: the gain of each layer of `before` that alone becomes of this kind}."""
            values = {task: book.evaluate(task, options.objective(task, kind), bar) for task in book.tasks}
            return {task: importance(before, value, kind) for task, value in values.items()}

        value = book.evaluate(options.full_task, options.full_objective, bar)
        full = search(start, options.full_layers, value, budgets=options.budgets)
        maps, window, placement = {"attn": map_of("attn", start)}, None, full.placement
        if options.window_layers:
            value = book.evaluate(options.window_task, options.window_objective, bar)
            window = search(placement, options.window_layers, value, kind="swa")
            maps["swa"] = map_of("swa", placement)
            placement = window.placement
    return PlacementResult(placement, full, window, maps, losses)


def export(network: SuperNetwork, placement: Placement, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes the model of a placement as the published config.json and safetensors, and the tokenizer, if any."""
    network.extract(placement).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
