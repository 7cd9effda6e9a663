"""Stages 2 to 4: candidates that are trained and measured in one placement, from options to a report.

What `jetkernels search blocks`, `design` and `shapes` run; the other stages are in `stages`.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from jetkernels.model import Tokenizer
from jetkernels.modules import JetBlock, JetBlockConfig

from .blocks import BLOCKS, equal_parameters
from .candidates import Measured, Meter, measure_all, over_seeds
from .costs import Cost, write_cost
from .data import Loader
from .design import DESIGNS, DesignedBlock
from .hybrid import save_hybrid
from .linear_path import JET, LinearPath
from .options import DistillOptions, Facts, Integers, QualityOptions, ShapeOptions, StartOptions
from .placement import export
from .report.candidates import best_exported, write_candidate_report, write_shape_report
from .report.tables import not_exported, write_text
from .selection import best_candidate, best_shape
from .shapes import Shape, equal_cache_grid
from .stages import load_base
from .super_network import PATHS, Placement, SuperNetwork
from .training import ranks

# What `SuperNetwork` takes as its linear paths.
Paths = JetBlockConfig | Callable[[int], nn.Module]


def placement_of(text: str) -> Placement:
    """The placement of `ComparisonOptions.placement`: the layers themselves, or those in a folder's result.json.

    Raises:
        ValueError: it is neither.
    """
    path = Path(text) / "result.json"
    if not path.is_file():
        named = tuple(text.split())
        if not named or set(named) - set(PATHS):
            raise ValueError(
                f"--placement must be {', '.join(PATHS)} for each layer, or a folder of `search placement`, "
                f"got {text[:200]!r}"
            )
        return named
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["placement"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, list) or not found or not all(kind in PATHS for kind in found):
        raise ValueError(f"--placement: {path} must be a result of `search placement`")
    return tuple(found)


RESULT = "result.json"


def write_result(folder: Path, best: str, exported: str | None, means: Sequence[Measured] = ()) -> None:
    """Writes what a comparison ends with.

    Args:
        folder: of the stage.
        best: name of the best candidate.
        exported: of the best of those that a model can be exported with; None: there is none.
        means: one row per candidate (`over_seeds`).
    """
    values = {"best": best, "exportable": exported, "qualities": {row.name: row.quality for row in means}}
    write_text(folder / RESULT, json.dumps(values, indent=1) + "\n")


def read_quality(folder: Path, name: str) -> float | None:
    """What `write_result` wrote of a candidate; None where it has none of this name, or there is no such file."""
    if not (folder / RESULT).is_file():
        return None
    qualities = _read(folder).get("qualities", {})
    return qualities.get(name) if isinstance(qualities, dict) else None


def read_result(folder: Path, which: str) -> str | None:
    """The name that `write_result` wrote as "best" or "exportable".

    Raises:
        OSError: there is no such file.
        ValueError: it holds something else.
    """
    found = _read(folder)[which]
    if found is not None and not isinstance(found, str):
        raise ValueError(f"{folder / RESULT} must be a result of a comparison of candidates")
    return found


def _read(folder: Path) -> dict[str, Any]:
    """What `write_result` wrote."""
    try:
        found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"best", "exportable"} <= {*found}:
        raise ValueError(f"{folder / RESULT} must be a result of a comparison of candidates")
    return found


@dataclass(frozen=True)
class Comparison:
    """What a comparison of candidates ends with.

    Attributes:
        rows: every seed of every candidate.
        meter: that measured them.
        tokenizer: of the base.
        facts: what the report says about them.
    """

    rows: list[Measured]
    meter: Meter
    tokenizer: Tokenizer
    facts: Facts


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(QualityOptions, DistillOptions):
    """What stages 2, 3 and 4 share: candidates that are trained and measured in one placement.

    Attributes:
        base: folder of the base, or a GGUF file.
        placement: folder of a placement stage, or the kind of each layer with blanks between.
        together: candidates that are trained side by side, for which the base's features are computed once.
        speed_batch: sequences of the speed measurement.
        speed_prompt: tokens of its prompts.
        speed_tokens: generated tokens that are timed.
    """

    base: Path
    placement: str
    steps: int = 300
    together: int = 4
    speed_batch: int = 4
    speed_prompt: int = 64
    speed_tokens: int = 32

    @abstractmethod
    def path_of(self, name: str) -> LinearPath:
        """What a candidate puts in the place of attention."""

    def paths(self, name: str) -> Paths:
        """The linear paths of a candidate."""
        return self.path_of(name).paths()

    def begin(self, network: SuperNetwork, loader: Loader) -> None:
        """Gives the paths of a network their first values: here they keep those that they were drawn with."""

    def forget(self, meter: Meter) -> Callable[[str, int], None]:
        """What deletes the checkpoint of a training, at several times the size of its blocks, when its row is kept."""
        return meter.forget

    def compare(self, names: Sequence[str]) -> Comparison:
        """Trains and measures the candidates."""
        base, tokenizer = load_base(self.base, self.device)
        for name in names:
            # One that cannot be built is refused before any is trained.
            paths, size = self.paths(name), base.config.hidden_size
            with torch.device("meta"):
                JetBlock(size, paths) if isinstance(paths, JetBlockConfig) else paths(size)
        corpus = self.corpus(tokenizer, base.config.vocab_size)
        facts, placement = self.facts(corpus, base), placement_of(self.placement)
        settings = ("task", "objective", "seeds", "speed_batch", "speed_prompt", "speed_tokens")
        asked = [*self.score_facts(), *self.named(settings), ("placement", " ".join(placement))]
        teacher = self.teacher(base)
        loader = self.loader(corpus, tokenizer)

        def new_network(name: str, seed: int) -> SuperNetwork:
            network = SuperNetwork(
                base, self.paths(name), self.window_size, seed, self.recompute, self.train_attention, teacher
            )
            self.begin(network, replace(loader, seed=seed))
            return network

        meter = Meter(
            new_network,
            placement,
            loader,
            self.recipe(),
            self.tasks(corpus, tokenizer),
            dict(facts),
            self.task,
            self.objective,
            self.speed_batch,
            self.speed_prompt,
            self.speed_tokens,
            folder=self.output / "training",
            layer_steps=self.layer_steps,
        )
        seeds = range(self.seed, self.seed + self.seeds)
        kept = self.output / "candidates.ckpt"
        rows = measure_all(
            names,
            meter,
            dict(facts + asked),
            kept,
            seeds,
            meter.train_together,
            self.together,
            forget=self.forget(meter),
        )
        if ranks()[0] == 0:
            tokens = sum(len(row.losses) for row in rows) * self.batch * self.length
            write_cost(self.output, Cost(tokens, sum(row.training_seconds for row in rows)))
        return Comparison(rows, meter, tokenizer, facts + asked)

    def report(self, found: Comparison, title: str, pair: tuple[str, str] | None = None) -> str | None:
        """Chooses the best candidate and writes the report to `output`; pair: two that are compared on their own."""
        if ranks()[0]:
            return None
        means = over_seeds(found.rows)
        best = best_candidate(means)
        held = [row for row in means if self.path_of(row.name).config() is not None]
        exported = best_candidate(held).name if held else None
        write_candidate_report(self.output, title, found.rows, best, exported, pair, self.quality, found.facts)
        write_result(self.output, best.name, exported, means)
        print(f"best: {best.name}{best_exported(best.name, exported)}; report: {self.output}/report.md")
        return f"best {self.quality}: {best.name}, {best.quality:.4f}{best_exported(best.name, exported)}"


@dataclass(frozen=True, kw_only=True)
class BlocksStage(ComparisonOptions, ShapeOptions):
    """Stage 2: linear-attention blocks side by side, at equal cache.

    Attributes:
        equal: what the other blocks have like the JetBlock: the recurrent "state", or the "parameters".
        only: names of the blocks that are compared; None: all.
    """

    TRAINING: ClassVar[tuple[str, ...]] = ("equal",)

    equal: str = "state"
    only: Sequence[str] | None = None

    def path_of(self, name: str) -> LinearPath:
        """The block of this name."""
        return LinearPath(self.shape, name)

    def paths(self, name: str) -> Paths:
        """The block of this name, in a shape that makes it equal to the JetBlock."""
        kind = BLOCKS[name]
        if self.equal == "state":
            return lambda size: kind(size, self.shape)
        return lambda size: kind(size, equal_parameters(kind, size, self.shape))

    def run(self) -> str | None:
        """Writes the report to `output`."""
        found = self.compare(self.only or list(BLOCKS))
        return self.report(found, f"Linear-attention blocks of equal {self.equal}", ("JetBlock", "Mamba2"))


@dataclass(frozen=True, kw_only=True)
class DesignStage(ComparisonOptions, ShapeOptions):
    """Stage 3: the JetBlock with one choice of its design changed at a time.

    Attributes:
        only: names of the variants that are compared; None: all.
    """

    only: Sequence[str] | None = None

    def path_of(self, name: str) -> LinearPath:
        """The variant of this name."""
        return LinearPath(self.shape, design=name)

    def paths(self, name: str) -> Paths:
        """The variant of this name, also where a config could say it: all are measured in one form."""
        return lambda size: DesignedBlock(size, self.shape, DESIGNS[name])

    def run(self) -> str | None:
        """Writes the report to `output`."""
        return self.report(self.compare(self.only or list(DESIGNS)), "Design of the JetBlock")


@dataclass(frozen=True, kw_only=True)
class ShapesStage(StartOptions, ComparisonOptions):
    """Stage 4: K, V and H of the linear blocks, at equal cache and sufficient generation speed.

    Attributes:
        block: name of the block.
        design: of the JetBlock.
        state: elements of state per block, K*V*H.
        heads: H to try.
        keys: K to try; V follows.
        min_throughput: generated tokens per second that a shape must reach; None: see min_share.
        min_share: the same as a share of the fastest shape's.
        blocks_folder: of stage 2, whose JetBlock is a line in the picture; None: no line.
    """

    TRAINING: ClassVar[tuple[str, ...]] = ("block", "design")

    block: str = JET
    design: str = JET
    state: int = 2048
    heads: Integers = Integers((4, 8))
    keys: Integers = Integers((8, 16, 32))
    min_throughput: float | None = None
    min_share: float = 0.9
    blocks_folder: Path | None = None

    def path_of(self, name: str) -> LinearPath:
        """The block of this shape."""
        return LinearPath(Shape.from_name(name), self.block, self.design)

    def forget(self, meter: Meter) -> Callable[[str, int], None]:
        """Leaves what the exported model may come from: the first seed of each shape."""
        return lambda name, seed: None if seed == self.seed else meter.forget(name, seed)

    def grid(self) -> list[Shape]:
        """The shapes that are compared: of `equal_cache_grid` those that the design's generator has a width for.

        Raises:
            ValueError: there is none, or see `equal_cache_grid`.
        """
        shapes, least = equal_cache_grid(self.state, self.heads, self.keys), DESIGNS[self.design].reduction
        wide = [shape for shape in shapes if shape.H * shape.V >= least]
        if not wide:
            names = ", ".join(shape.name for shape in shapes)
            raise ValueError(f"H*V must be at least {least} in some shape for the design {self.design}, got {names}")
        return wide

    def run(self) -> str | None:
        """Writes the report and the model of the chosen shape to `output`.

        One that cannot be exported is kept for the final stage (`hybrid.save_hybrid`).
        """
        found = self.compare([shape.name for shape in self.grid()])
        if ranks()[0]:
            return None
        means = over_seeds(found.rows)
        fastest = max(row.generation_per_second for row in means)
        minimum = self.min_share * fastest if self.min_throughput is None else self.min_throughput
        best = best_shape(means, minimum)
        path = self.path_of(best.name)
        reference = None if self.blocks_folder is None else read_quality(self.blocks_folder, JET)
        level = None if reference is None else (f"{JET} of stage 2", reference)
        write_shape_report(self.output, found.rows, best, str(path), minimum, self.quality, found.facts, level)
        write_result(self.output, best.name, best.name if path.config() is not None else None, means)
        network, _ = found.meter.train(best.name, self.seed)
        for row in means:
            if row.name != best.name:
                found.meter.forget(row.name, self.seed)
        placement, model = found.meter.placement, self.output / "model"
        if path.config() is not None:
            export(network, placement, model, found.tokenizer)
            said = f"model: {model}"
        else:
            save_hybrid(model, network.assemble(placement), placement, path, self.window_size)
            said = f"weights: {model}. {not_exported(str(path))}"
        print(f"best: {best.name} (KxVxH); report: {self.output}/report.md; {said}")
        return f"{path}, chosen (KxVxH): {best.name}"
