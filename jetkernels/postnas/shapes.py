"""Stage 4: sizes of the JetBlock, on a grid over (K, V, H) at equal cache, with measured generation speed as the constraint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from jetkernels.model.speed import Speed, measure_speed
from jetkernels.modules import JetBlockConfig

from .checkpoints import fingerprint, load_state, save_state
from .data import Loader
from .placement import train_super_network
from .report import markdown_table, provenance, write_text
from .super_network import Placement, SuperNetwork
from .tasks import OBJECTIVES, Task
from .training import Recipe, ranks


class Shape(NamedTuple):
    """K: head dimension of queries and keys.  V: of values.  H: heads. A layer's recurrent state has H*K*V elements."""

    K: int
    V: int
    H: int

    @property
    def state(self) -> int:
        return self.K * self.V * self.H

    def config(self, like: JetBlockConfig = JetBlockConfig()) -> JetBlockConfig:
        """The JetBlock of this shape, everything else as in `like`."""
        expand = self.V / self.K
        # The config stores V as a ratio and rounds down.
        while int(self.K * expand) < self.V:
            expand = math.nextafter(expand, math.inf)
        return replace(like, num_heads=self.H, head_dim=self.K, expand_v=expand)


def equal_cache_grid(state: int, heads: Sequence[int], keys: Sequence[int]) -> list[Shape]:
    """Shapes with `state` elements of recurrent state per layer: V follows from K and H where it is whole.

    Raises ValueError if no combination divides `state`.
    """
    if state < 1 or min([*heads, *keys], default=0) < 1:
        raise ValueError(f"state, heads and keys must be positive, got {state}, {list(heads)} and {list(keys)}")
    found = [Shape(K, state // (K * H), H) for H in sorted(set(heads)) for K in sorted(set(keys), reverse=True) if state % (K * H) == 0]
    if not found:
        raise ValueError(f"state must be a multiple of K*H for some K of {list(keys)} and H of {list(heads)}, got {state}")
    return found


@dataclass(frozen=True)
class ShapeResult:
    """One row of the grid. parameters: of the model.  cache_bytes: of the cache at the measured length and batch.
    tokens_per_second: generation.  quality: objective, more is better.  scores: {task: (loss, accuracy)}."""

    shape: Shape
    parameters: int
    cache_bytes: int
    tokens_per_second: float
    quality: float
    scores: Mapping[str, tuple[float, float]]


def best_shape(rows: Sequence[ShapeResult], minimum: float) -> ShapeResult:
    """The row of the best quality among those that generate at least `minimum` tokens per second; ties go to the faster one.

    Raises ValueError if no row is fast enough.
    """
    fast = [row for row in rows if row.tokens_per_second >= minimum]
    if not fast:
        fastest = max((row.tokens_per_second for row in rows), default=0.0)
        raise ValueError(f"throughput must reach {minimum:,.1f} tokens/s in at least one shape; the fastest reaches {fastest:,.1f}")
    return max(fast, key=lambda row: (row.quality, row.tokens_per_second))


def search_shapes(
    shapes: Sequence[Shape], measure: Callable[[Shape], ShapeResult], facts: Mapping, checkpoint: str | Path | None = None
) -> list[ShapeResult]:
    """Measures every shape, in order. A resumed run takes finished rows, timings included, from the checkpoint.

    facts: JSON values that the rows depend on; a checkpoint of other ones is refused.
    """
    run = fingerprint(dict(facts) | {"shapes": [list(shape) for shape in shapes]})
    rows: list[ShapeResult] = []
    if checkpoint is not None and Path(checkpoint).exists():
        for values in load_state(checkpoint, "shapes", run)["rows"]:
            scores = {task: tuple(pair) for task, pair in values.pop("scores").items()}
            rows.append(ShapeResult(Shape(*values.pop("shape")), scores=scores, **values))
    with tqdm(total=len(shapes), initial=len(rows), desc="shapes", leave=False, disable=ranks()[0] > 0) as bar:
        for shape in shapes[len(rows) :]:
            rows.append(measure(shape))
            if checkpoint is not None and ranks()[0] == 0:
                plain = [asdict(row) | {"shape": list(row.shape), "scores": {k: list(v) for k, v in row.scores.items()}} for row in rows]
                save_state(checkpoint, "shapes", run, {"rows": plain})
            bar.update()
    return rows


@dataclass(frozen=True)
class ShapeMeter:
    """Trains a hybrid of one shape by distillation and measures it: `search_shapes`'s `measure` on a real base.

    new_network: JetBlock sizes -> a super network of the base.  placement: fixed for all shapes.  Same data, recipe and
    seed for each shape.  folder: of one training checkpoint per shape.
    """

    new_network: Callable[[JetBlockConfig], SuperNetwork]
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

    def train(self, shape: Shape) -> SuperNetwork:
        """The super network of this shape with its JetBlocks trained for the placement."""
        network = self.new_network(shape.config())
        checkpoint = self.folder / "-".join(map(str, ("shape", *shape))) if self.folder is not None else None
        train_super_network(
            network, self.loader, self.recipe, self.facts, checkpoint and checkpoint.with_suffix(".ckpt"), placement=self.placement
        )
        return network

    def speed(self, network: SuperNetwork) -> Speed:
        return measure_speed(network.extract(self.placement), self.batch, self.prompt_length, self.new_tokens, self.repeats)

    def __call__(self, shape: Shape) -> ShapeResult:
        network = self.train(shape)
        device = network.base.device
        scores = {task.name: task.score(lambda ids: network(ids.to(device), self.placement)) for task in self.tasks}
        if self.objective_task not in scores:
            raise ValueError(f"objective_task must be one of {', '.join(scores)}, got {self.objective_task!r}")
        speed = self.speed(network)
        model = network.extract(self.placement)
        return ShapeResult(
            shape,
            sum(p.numel() for p in model.parameters()),
            speed.cache_bytes,
            speed.decode_tokens_per_second,
            OBJECTIVES[self.objective](scores[self.objective_task]),
            {name: (score.loss, score.accuracy) for name, score in scores.items()},
        )


def write_shape_report(
    folder: str | Path, rows: Sequence[ShapeResult], minimum: float, facts: Sequence[tuple[str, object]]
) -> ShapeResult:
    """report.md with the grid as a table of the paper's form; returns the chosen row."""
    best = best_shape(rows, minimum)
    tasks = list(rows[0].scores)
    header = ["K", "V", "H", "parameters (M)", "cache (KiB)", "generation (tokens/s)", "fast enough", "chosen"]
    header += [f"{task}, {what}" for task in tasks for what in ("loss", "accuracy")]
    table = [
        [
            *row.shape,
            row.parameters / 1e6,
            f"{row.cache_bytes / 1024:.1f}",
            f"{row.tokens_per_second:,.1f}",
            "yes" if row.tokens_per_second >= minimum else "no",
            "**yes**" if row is best else "",
            *(value for task in tasks for value in row.scores[task]),
        ]
        for row in rows
    ]
    text = [
        "# Sizes of the JetBlock\n",
        f"Chosen: K = {best.shape.K}, V = {best.shape.V}, H = {best.shape.H}: the best quality among the shapes that generate at "
        f"least {minimum:,.1f} tokens/s on this machine. Every shape has {best.shape.state:,} elements of state per JetBlock layer.\n",
        markdown_table(header, table),
        "## Provenance\n",
        provenance(facts),
    ]
    write_text(Path(folder) / "report.md", "\n".join(text))
    return best
