"""Comparing linear blocks on one base: same placement, data, recipe and seed; quality and speed of each."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jetkernels._progress import progress
from jetkernels.model import JetNemotronCache, JetNemotronForCausalLM
from jetkernels.model.speed import measure_speed, synchronize

from .checkpoints import load_state, save_state
from .data import Loader
from .placement import train_super_network
from .report import markdown_table
from .super_network import Placement, SuperNetwork
from .tasks import Task, objective_of
from .training import Recipe, ranks

TIMED_STEPS = 3
SPEEDS = ("training_per_second", "prefill_per_second", "generation_per_second")


@dataclass(frozen=True)
class Measured:
    """One candidate, trained and measured.

    seed: of its initial values and its training data.  parameters: of one block.  state: elements of recurrent state of
    one layer and sequence.  cache_bytes: of the model's cache at the measured batch and length.
    *_per_second: tokens, in training (forward and backward), prefill and generation.
    quality: the objective, more is better.  scores: {task: (loss, accuracy)}.  losses: of the training, by step.
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


class BlockModel(JetNemotronForCausalLM):
    """The model of a placement whose "jet" layers hold any blocks; for measuring. It shares the network's tensors."""

    def __init__(self, network: SuperNetwork, placement: Placement):
        super().__init__(network.config(placement), device="meta")
        self.blocks = {i: network.jet[i] for i, kind in enumerate(placement) if kind == "jet"}
        base = network.base
        self.model.embed_tokens, self.model.norm = base.model.embed_tokens, base.model.norm
        if not self.config.tie_word_embeddings:
            self.lm_head = base.lm_head
        for i, (layer, old) in enumerate(zip(self.model.layers, base.model.layers)):
            layer.mlp, layer.input_layernorm = old.mlp, old.input_layernorm
            layer.post_attention_layernorm = old.post_attention_layernorm
            layer.self_attn = network.mixer(i, placement[i])

    def new_cache(self, batch_size: int, max_length: int) -> JetNemotronCache:
        cache = super().new_cache(batch_size, max_length)
        for i, block in self.blocks.items():
            cache.layers[i] = block.new_state(batch_size)
        return cache


def measure_all(
    names: Sequence[str],
    measure: Callable[[str, int], Measured],
    facts: Mapping,
    checkpoint: str | Path | None = None,
    seeds: Sequence[int] = (0,),
) -> list[Measured]:
    """Measures every candidate with every seed, seed by seed. A resumed run takes finished rows, timings included, from
    the checkpoint.

    facts: JSON values that the rows depend on; a checkpoint of other ones is refused.
    """
    run = dict(facts) | {"candidates": list(names), "runs": list(seeds)}
    wanted = [(name, seed) for seed in seeds for name in names]
    rows: list[Measured] = []
    if checkpoint is not None and Path(checkpoint).exists():
        for values in load_state(checkpoint, "candidates", run)["rows"]:
            scores = {task: tuple(pair) for task, pair in values.pop("scores").items()}
            rows.append(Measured(scores=scores, **values))
    with progress(total=len(wanted), initial=len(rows), desc="candidates", disable=ranks()[0] > 0) as bar:
        for name, seed in wanted[len(rows) :]:
            rows.append(measure(name, seed))
            if checkpoint is not None and ranks()[0] == 0:
                plain = [
                    asdict(row) | {"scores": {task: list(pair) for task, pair in row.scores.items()}} for row in rows
                ]
                save_state(checkpoint, "candidates", run, {"rows": plain})
            bar.update()
    return rows


def over_seeds(rows: Sequence[Measured]) -> list[Measured]:
    """One row per candidate: means of quality and scores, medians of the speeds; the rest is that of its first seed."""
    found = []
    for name in dict.fromkeys(row.name for row in rows):
        same = [row for row in rows if row.name == name]
        scores = {
            task: tuple(statistics.mean(row.scores[task][i] for row in same) for i in (0, 1)) for task in same[0].scores
        }
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


def spread_sentence(rows: Sequence[Measured]) -> str:
    """How far the quality of one candidate is from seed to seed, for a report."""
    deviation = spread(rows)
    if deviation is None:
        return (
            "One seed per candidate: how far the quality of one candidate moves from seed to seed was not measured.\n"
        )
    seeds = len({row.seed for row in rows})
    return (
        f"Means over {seeds} seeds (initial values and training rows). The quality of one candidate moves from seed to seed by "
        f"{deviation:.4f} (standard deviation, pooled over the candidates), so the standard error of a difference between two "
        f"rows is {deviation * math.sqrt(2 / seeds):.4f}; differences of less than twice that show nothing.\n"
    )


@dataclass(frozen=True)
class Meter:
    """Trains a candidate by distillation in a fixed placement and measures it: `measure_all`'s `measure` on a real
    base.

    new_network: name, seed -> a super network with that candidate's blocks.  loader: of the training rows, whatever its
    seed.
    objective_task: whose objective is the quality.
    batch, prompt_length, new_tokens, repeats: of the speed measurement (`jetkernels.model.speed`).
    folder: of one training checkpoint per candidate.
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

    def __post_init__(self):
        names = [task.name for task in self.tasks]
        if self.objective_task not in names:
            raise ValueError(f"task must be one of {', '.join(names)}, got {self.objective_task!r}")
        if "jet" not in self.placement:
            raise ValueError(f"placement must have a jet layer, got {' '.join(self.placement)}")

    def train(self, name: str, seed: int) -> tuple[SuperNetwork, list[float]]:
        """The super network of a candidate, its blocks trained for the placement, and the losses."""
        network = self.new_network(name, seed)
        file = f"{name.replace(' ', '-').replace(',', '')}-seed{seed}.ckpt"
        checkpoint = self.folder / file if self.folder is not None else None
        facts = dict(self.facts) | {"candidate": name}
        loader = replace(self.loader, seed=seed)
        losses = train_super_network(network, loader, self.recipe, facts, checkpoint, placement=self.placement)
        return network, losses

    def training_speed(self, network: SuperNetwork) -> float:
        """Tokens per second of forward and backward of the distillation, the median of a few steps."""
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
        network, losses = self.train(name, seed)
        device = network.base.device
        scores = {task.name: task.score(lambda ids: network(ids.to(device), self.placement)) for task in self.tasks}
        training = self.training_speed(network)
        speed = measure_speed(
            BlockModel(network, self.placement), self.batch, self.prompt_length, self.new_tokens, self.repeats
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
            losses,
        )


def candidate_table(rows: Sequence[Measured]) -> str:
    """Quality and speed, one row per candidate, as Markdown."""
    tasks = list(rows[0].scores)
    header = [
        "candidate",
        "parameters of a block",
        "state of a layer",
        "cache (KiB)",
        "training (tokens/s)",
        "prefill (tokens/s)",
    ]
    header += ["generation (tokens/s)", *(f"{task}, {what}" for task in tasks for what in ("loss", "accuracy"))]
    lines = []
    for row in rows:
        speeds = (row.training_per_second, row.prefill_per_second, row.generation_per_second)
        cells = [
            row.name,
            f"{row.parameters:,}",
            f"{row.state:,}",
            f"{row.cache_bytes / 1024:.1f}",
            *(f"{s:,.1f}" for s in speeds),
        ]
        lines.append(cells + [value for task in tasks for value in row.scores[task]])
    return markdown_table(header, lines)
