"""Comparing linear blocks on one base: same placement, data, recipe and seed; quality and speed of each."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jetkernels._progress import progress
from jetkernels.model.speed import measure_speed, synchronize

from .checkpoints import load_state, save_state
from .data import Loader
from .placement import super_network_training
from .super_network import Placement, SuperNetwork
from .tasks import Task, objective_of
from .training import Losses, Recipe, Training, ranks, train_together, wait_for_ranks

TIMED_STEPS = 3
SPEEDS = ("training_per_second", "prefill_per_second", "generation_per_second")


@dataclass(frozen=True)
class Measured:
    """One candidate, trained and measured.

    Attributes:
        name: of the candidate.
        seed: of its initial values and its training data.
        parameters: of one block.
        state: elements of recurrent state of one layer and sequence.
        cache_bytes: of the model's cache at the measured batch and length.
        training_per_second: tokens, forward and backward.
        prefill_per_second: tokens.
        generation_per_second: tokens.
        quality: the objective, more is better.
        scores: {task: (loss, accuracy)}.
        losses: of the training, by step.
        training_seconds: that it took.
    """

    name: str
    seed: int
    parameters: int
    state: int
    cache_bytes: int
    training_per_second: float
    prefill_per_second: float
    generation_per_second: float
    quality: float
    scores: Mapping[str, tuple[float, float]]
    losses: Sequence[float] = ()
    training_seconds: float = 0.0


def measure_all(
    names: Sequence[str],
    measure: Callable[[str, int], Measured],
    facts: Mapping,
    checkpoint: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    prepare: Callable[[Sequence[str], int], None] | None = None,
    together: int = 1,
    forget: Callable[[str, int], None] | None = None,
) -> list[Measured]:
    """Measures every candidate with every seed, seed by seed.

    A resumed run takes finished rows, timings included, from the checkpoint.

    Args:
        names: of the candidates; one that is named twice is measured once.
        measure: name, seed -> row.
        facts: JSON values that the rows depend on; a checkpoint of other ones is refused.
        checkpoint: file that keeps the finished rows.
        seeds: each of them gives a row of every candidate.
        prepare: names, seed; called before the first of `together` candidates is measured.
        together: candidates that are prepared at once.
        forget: name, seed; called on rank 0 when the row is in the checkpoint, on every rank done with.
    """
    names = list(dict.fromkeys(names))
    run = dict(facts) | {"candidates": names, "runs": list(seeds)}
    wanted = [(name, seed) for seed in seeds for name in names]
    rows: list[Measured] = []
    if checkpoint is not None and Path(checkpoint).exists():
        for values in load_state(checkpoint, "candidates", run)["rows"]:
            scores = {task: tuple(pair) for task, pair in values.pop("scores").items()}
            rows.append(Measured(scores=scores, **values))
    with progress(total=len(wanted), initial=len(rows), desc="candidates", disable=ranks()[0] > 0) as bar:
        prepared: set[tuple[str, int]] = set()
        for name, seed in wanted[len(rows) :]:
            if prepare is not None and (name, seed) not in prepared:
                group = [pair for pair in wanted[len(rows) : len(rows) + together] if pair[1] == seed]
                prepare([each for each, _ in group], seed)
                prepared.update(group)
            rows.append(measure(name, seed))
            if checkpoint is not None and ranks()[0] == 0:
                plain = [
                    asdict(row) | {"scores": {task: list(pair) for task, pair in row.scores.items()}} for row in rows
                ]
                save_state(checkpoint, "candidates", run, {"rows": plain})
            if forget is not None:
                wait_for_ranks()  # one that is behind still reads what is to go
                if ranks()[0] == 0:
                    forget(name, seed)
            bar.update()
    return rows


def over_seeds(rows: Sequence[Measured]) -> list[Measured]:
    """One row per candidate: means of quality and scores, medians of the speeds; the rest is that of its first seed."""
    found = []
    for name in dict.fromkeys(row.name for row in rows):
        same = [row for row in rows if row.name == name]
        pairs = {task: list(zip(*(row.scores[task] for row in same))) for task in same[0].scores}
        scores = {task: (statistics.mean(loss), statistics.mean(right)) for task, (loss, right) in pairs.items()}
        speeds = {field: statistics.median(getattr(row, field) for row in same) for field in SPEEDS}
        found.append(replace(same[0], quality=statistics.mean(row.quality for row in same), scores=scores, **speeds))
    return found


def spread(rows: Sequence[Measured]) -> float | None:
    """Standard deviation of the quality between seeds, pooled over the candidates; None if each has one seed."""
    groups = [[row.quality for row in rows if row.name == name] for name in dict.fromkeys(row.name for row in rows)]
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return None
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(sum(statistics.variance(group) * (len(group) - 1) for group in groups) / freedom)


@dataclass(frozen=True)
class Meter:
    """Trains a candidate by distillation in a fixed placement and measures it: the `measure` of `measure_all`.

    Attributes:
        new_network: name, seed -> a super network with that candidate's blocks.
        placement: in which every candidate is trained and measured.
        loader: of the training rows, whatever its seed.
        recipe: of the training.
        tasks: that the trained model is scored on.
        facts: JSON values that a training depends on; a checkpoint of other ones is refused.
        objective_task: whose objective is the quality.
        objective: what of its score.
        batch: sequences of the speed measurement (`jetkernels.model.speed`).
        prompt_length: of each of them, tokens.
        new_tokens: decode steps that are timed.
        repeats: runs that are timed.
        folder: of one training checkpoint per candidate.
        layer_steps: of the training's steps, the first so many are layer by layer (`SuperNetwork.layer_losses`).
    """

    new_network: Callable[[str, int], SuperNetwork]
    placement: Placement
    loader: Loader
    recipe: Recipe
    tasks: Sequence[Task]
    facts: Mapping
    objective_task: str
    objective: str = "loss"
    batch: int = 4
    prompt_length: int = 64
    new_tokens: int = 32
    repeats: int = 3
    folder: Path | None = None
    layer_steps: int = 0

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        if self.objective_task not in names:
            raise ValueError(f"task must be one of {', '.join(names)}, got {self.objective_task!r}")
        if "jet" not in self.placement:
            raise ValueError(f"placement must have a jet layer, got {' '.join(self.placement)}")

    def training(self, name: str, seed: int) -> tuple[SuperNetwork, Training]:
        """The super network of a candidate, and the training of its blocks for the placement."""
        network = self.new_network(name, seed)
        facts = dict(self.facts) | {"candidate": name}
        loader = replace(self.loader, seed=seed)
        training = super_network_training(
            network,
            loader,
            self.recipe,
            facts,
            self.checkpoint(name, seed),
            placement=self.placement,
            layer_steps=self.layer_steps,
        )
        return network, training

    def checkpoint(self, name: str, seed: int) -> Path | None:
        """Of a candidate's training."""
        file = f"{name.replace(' ', '-').replace(',', '')}-seed{seed}.ckpt"
        return None if self.folder is None else self.folder / file

    def forget(self, name: str, seed: int) -> None:
        """Deletes the checkpoint of a candidate's training, if there is one."""
        if (checkpoint := self.checkpoint(name, seed)) is not None:
            checkpoint.unlink(missing_ok=True)

    def train(self, name: str, seed: int) -> tuple[SuperNetwork, Losses]:
        """The super network of a candidate, trained, and the losses."""
        network, training = self.training(name, seed)
        train_together([training])
        return network, training.losses

    def train_together(self, names: Sequence[str], seed: int) -> None:
        """Trains several candidates side by side, which then share the base's features, up to their checkpoints."""
        if self.folder is not None:
            train_together([self.training(name, seed)[1] for name in names])
            wait_for_ranks()  # what reads the checkpoints next finds the last ones

    def training_speed(self, network: SuperNetwork) -> float:
        """Tokens per second of the distillation, the median of a few steps.

        Forward and backward of the candidate's model; the base's features are there.
        """
        rows = self.loader.batch(0)[:, :-1].to(network.base.device)
        seconds = []
        for _ in range(1 + TIMED_STEPS):
            synchronize(rows.device)
            start = time.perf_counter()
            network.distillation_loss(rows, self.placement).backward()
            synchronize(rows.device)
            seconds.append(time.perf_counter() - start)
            network.zero_grad(set_to_none=True)
        return rows.numel() / statistics.median(seconds[1:])

    def __call__(self, name: str, seed: int) -> Measured:
        """Trains and measures one candidate."""
        network, losses = self.train(name, seed)
        device = network.base.device
        scores = {task.name: task.score(lambda ids: network(ids.to(device), self.placement)) for task in self.tasks}
        training = self.training_speed(network)
        speed = measure_speed(
            network.assemble(self.placement), self.batch, self.prompt_length, self.new_tokens, self.repeats
        )
        block = network.jet[self.placement.index("jet")]
        return Measured(
            name,
            seed,
            sum(p.numel() for p in block.parameters()),
            network.state_elements,
            speed.cache_bytes,
            training,
            speed.prefill_tokens_per_second,
            speed.decode_tokens_per_second,
            objective_of(self.objective_task, scores[self.objective_task], self.objective),
            {task: (score.loss, score.accuracy) for task, score in scores.items()},
            list(losses),
            losses.seconds,
        )
