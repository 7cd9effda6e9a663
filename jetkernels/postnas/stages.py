"""The stages of the search, from options to a model and a report: what each subcommand of `jetkernels search` runs.

A stage draws rows from the text, trains, scores, and hands what it found to its report. Killed, it goes on from its
checkpoints when it is run again.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from jetkernels._progress import progress
from jetkernels.model import JetNemotronForCausalLM, Tokenizer
from jetkernels.model.tokenizer import TOKENIZER_FILE
from jetkernels.modules import JetBlock, JetBlockConfig

from .base import from_pretrained, small_base, train_base
from .blocks import BLOCKS, equal_parameters
from .candidates import Measured, Meter, measure_all, over_seeds
from .design import DESIGNS, DesignedBlock
from .final import train_final
from .linear_path import JET, LinearPath
from .options import (
    OBJECTIVE_NAMES,
    DistillOptions,
    Facts,
    Integers,
    QualityOptions,
    SearchOptions,
    ShapeOptions,
    SizeOptions,
    TaskOptions,
    mark_of,
)
from .placement import PlacementOptions, ScoreBook, export, search_placement, train_super_network
from .report.base import write_base_report
from .report.candidates import write_candidate_report, write_shape_report
from .report.final import write_final_report
from .report.placement import write_report
from .report.tables import not_exported
from .selection import best_candidate, best_shape
from .shapes import Shape, equal_cache_grid
from .super_network import PATHS, Placement, SuperNetwork
from .tasks import Score, Task
from .teacher import Teacher
from .training import ranks

# What `SuperNetwork` takes as its linear paths.
Paths = JetBlockConfig | Callable[[int], nn.Module]


def base_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a base; it has the token that marks the recall task's keys.

    Raises:
        FileNotFoundError: the base has no tokenizer.
        ValueError: it is damaged, or has no such token.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise FileNotFoundError(f"--base: {folder} has no {TOKENIZER_FILE}")
    tokenizer = Tokenizer.from_pretrained(folder)
    if tokenizer.end_of_text_id is None:
        raise ValueError(
            f"--base: the tokenizer in {folder} must have <|endoftext|>, which marks the recall task's keys"
        )
    return tokenizer


def load_base(folder: Path, device: str) -> tuple[JetNemotronForCausalLM, Tokenizer]:
    """Base and tokenizer of a folder.

    In fp32 whatever is stored: the paths beside it are trained in the base's dtype.
    """
    tokenizer = base_tokenizer(folder)
    loading = partial(progress, desc="loading base")
    return from_pretrained(folder, dtype=torch.float32, device=device, progress=loading), tokenizer


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


def scores_of(model: JetNemotronForCausalLM, tasks: Sequence[Task]) -> list[Score]:
    """The score of a model in each task."""
    return [task.score(lambda ids: model(ids.to(model.device)).logits) for task in tasks]


@dataclass(frozen=True, kw_only=True)
class BaseStage(SizeOptions):
    """Trains a small full-attention model on real text, to search on a CPU."""

    EXAMPLES = 64  # of each task that the report names

    steps: int = 4000
    batch: int = 16

    def run(self) -> str | None:
        """Writes the model, its tokenizer and the report to `output`."""
        tokenizer = Tokenizer.byte_level()
        corpus = self.corpus(tokenizer)
        model = small_base(
            self.layers, self.seed, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size
        ).to(self.device)
        model.model.recompute_layers = self.recompute
        losses = train_base(
            model,
            corpus,
            self.recipe(weight_decay=0.1),
            batch_size=self.batch,
            length=self.length,
            task_share=self.task_share,
            distances=self.distances,
            mark=mark_of(tokenizer),
            seed=self.seed,
            checkpoint=self.output / "base.ckpt",
        )
        if ranks()[0]:
            return None
        model.save_pretrained(self.output)
        tokenizer.save_pretrained(self.output)
        tasks = self.held_out_tasks(corpus, tokenizer, self.EXAMPLES)
        scores = dict(zip((task.name for task in tasks), scores_of(model, tasks)))
        tokens = len(losses) * self.batch * self.length
        write_base_report(self.output, model, scores, losses, tokens, self.facts(corpus))
        found = "held out, nats per token: " + ", ".join(f"{name} {score.loss:.4f}" for name, score in scores.items())
        print(f"{found}; model and report: {self.output}/")
        return found


@dataclass(frozen=True, kw_only=True)
class PlacementStage(SearchOptions, ShapeOptions, DistillOptions):
    """Stage 1: which layers keep full attention, which get a sliding window.

    Attributes:
        base: folder of the base.
        linear_path: name of the block beside the attention of each layer.
    """

    TRAINING: ClassVar[tuple[str, ...]] = ("linear_path",)

    base: Path
    steps: int = 600
    linear_path: str = JET

    def run(self) -> str | None:
        """Writes the placement, its report and the model that it makes to `output`."""
        base, tokenizer = load_base(self.base, self.device)
        corpus = self.corpus(tokenizer)
        path = LinearPath(self.shape, self.linear_path)
        network = SuperNetwork(base, path.paths(), self.window_size, self.seed, self.recompute, self.train_attention)
        options = PlacementOptions(
            full_layers=self.full,
            window_layers=self.window,
            full_task=self.full_task,
            window_task=self.window_task,
            full_objective=self.full_objective,
            window_objective=self.window_objective,
            width=self.width,
            exhaustive_up_to=self.exhaustive_up_to,
        )
        loader = self.loader(corpus, tokenizer)
        facts, asked = self.facts(corpus, base), self.score_facts()
        tasks = self.tasks(corpus, tokenizer)
        options.check(network.num_layers, [task.name for task in tasks])
        output = self.output
        losses = train_super_network(network, loader, self.recipe(), dict(facts), output / "super_network.ckpt")
        book = ScoreBook(network, tasks, dict(facts + asked), output / "scores.ckpt")
        result = search_placement(book, options, losses)
        if ranks()[0]:
            return None
        unseen = self.tasks(corpus, tokenizer, seed=1)
        fresh = ScoreBook(network, unseen, dict([*facts, *asked, ("examples seed", 1)]), output / "fresh_scores.ckpt")
        write_report(output, book, result, options, facts + asked, fresh)
        placement = " ".join(result.placement)
        print(f"placement: {placement}")
        if network.jet_config is None:
            print(f"report: {output}/report.md. {not_exported(str(path))}")
            return f"`{placement}`"
        export(network, result.placement, output / "model", tokenizer)
        print(
            f"report: {output}/report.md; model: {output}/model "
            f"(try: jetkernels generate --model {output}/model --prompt 'def ')"
        )
        return f"`{placement}`"


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
        base: folder of the base.
        placement: folder of a placement stage, or the kind of each layer with blanks between.
        speed_batch: sequences of the speed measurement.
        speed_prompt: tokens of its prompts.
        speed_tokens: generated tokens that are timed.
    """

    base: Path
    placement: str
    steps: int = 300
    speed_batch: int = 4
    speed_prompt: int = 64
    speed_tokens: int = 32

    @abstractmethod
    def paths(self, name: str) -> Paths:
        """The linear paths of a candidate."""

    @property
    def quality(self) -> str:
        """What the quality is, in words."""
        return f"{self.task}, {OBJECTIVE_NAMES[self.objective]}"

    def compare(self, names: Sequence[str]) -> Comparison:
        """Trains and measures the candidates."""
        base, tokenizer = load_base(self.base, self.device)
        for name in names:
            # One that cannot be built is refused before any is trained.
            paths, size = self.paths(name), base.config.hidden_size
            with torch.device("meta"):
                JetBlock(size, paths) if isinstance(paths, JetBlockConfig) else paths(size)
        corpus = self.corpus(tokenizer)
        facts, placement = self.facts(corpus, base), placement_of(self.placement)
        settings = ("task", "objective", "seeds", "speed_batch", "speed_prompt", "speed_tokens")
        asked = [*self.score_facts(), *self.named(settings), ("placement", " ".join(placement))]
        teacher = Teacher(base)
        meter = Meter(
            lambda name, seed: SuperNetwork(
                base, self.paths(name), self.window_size, seed, self.recompute, self.train_attention, teacher
            ),
            placement,
            self.loader(corpus, tokenizer),
            self.recipe(),
            self.tasks(corpus, tokenizer),
            dict(facts),
            self.task,
            self.objective,
            self.speed_batch,
            self.speed_prompt,
            self.speed_tokens,
            folder=self.output / "training",
        )
        seeds = range(self.seed, self.seed + self.seeds)
        rows = measure_all(names, meter, dict(facts + asked), self.output / "candidates.ckpt", seeds)
        return Comparison(rows, meter, tokenizer, facts + asked)

    def report(self, found: Comparison, title: str, pair: tuple[str, str] | None = None) -> str | None:
        """Chooses the best candidate and writes the report to `output`; pair: two that are compared on their own."""
        if ranks()[0]:
            return None
        best = best_candidate(over_seeds(found.rows))
        write_candidate_report(self.output, title, found.rows, best, pair, self.quality, found.facts)
        print(f"best: {best.name}; report: {self.output}/report.md")
        return f"best {self.quality}: {best.name}, {best.quality:.4f}"


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

    def paths(self, name: str) -> Paths:
        """The variant of this name."""
        return lambda size: DesignedBlock(size, self.shape, DESIGNS[name])

    def run(self) -> str | None:
        """Writes the report to `output`."""
        return self.report(self.compare(self.only or list(DESIGNS)), "Design of the JetBlock")


@dataclass(frozen=True, kw_only=True)
class ShapesStage(ComparisonOptions):
    """Stage 4: K, V and H of the JetBlocks, at equal cache and sufficient generation speed.

    Attributes:
        state: elements of state per JetBlock, K*V*H.
        heads: H to try.
        keys: K to try; V follows.
        min_throughput: generated tokens per second that a shape must reach; None: see min_share.
        min_share: the same as a share of the fastest shape's.
    """

    state: int = 2048
    heads: Integers = Integers((4, 8))
    keys: Integers = Integers((8, 16, 32))
    min_throughput: float | None = None
    min_share: float = 0.9

    def paths(self, name: str) -> Paths:
        """The JetBlock of this shape."""
        return Shape.from_name(name).config()

    def run(self) -> str | None:
        """Writes the report and the model of the chosen shape to `output`."""
        grid = equal_cache_grid(self.state, self.heads, self.keys)
        found = self.compare([shape.name for shape in grid])
        if ranks()[0]:
            return None
        means = over_seeds(found.rows)
        fastest = max(row.generation_per_second for row in means)
        minimum = self.min_share * fastest if self.min_throughput is None else self.min_throughput
        best = best_shape(means, minimum)
        write_shape_report(self.output, found.rows, best, minimum, self.quality, found.facts)
        network, _ = found.meter.train(best.name, self.seed)
        export(network, found.meter.placement, self.output / "model", found.tokenizer)
        print(f"best: {best.name} (KxVxH); report: {self.output}/report.md; model: {self.output}/model")
        return f"chosen (KxVxH): {best.name}"


@dataclass(frozen=True, kw_only=True)
class FinalStage(TaskOptions):
    """Stage 5: trains the found hybrid, first its token mixers by distillation, then all of it.

    Attributes:
        base: folder of the base, the teacher.
        model: folder of the hybrid that an earlier stage exported.
        whole_steps: of the whole model, after `steps` of distillation.
    """

    base: Path
    model: Path
    whole_steps: int = 500

    def run(self) -> str | None:
        """Writes the trained model and the report to `output`."""
        base, tokenizer = load_base(self.base, self.device)
        student = JetNemotronForCausalLM.from_pretrained(self.model, dtype=torch.float32, device=self.device)
        student.model.recompute_layers = self.recompute
        corpus = self.corpus(tokenizer)
        loader = self.loader(corpus, tokenizer)
        tasks, facts = self.tasks(corpus, tokenizer), self.facts(corpus, base)
        scores = {"base": scores_of(base, tasks), "hybrid before": scores_of(student, tasks)}
        recipe = self.recipe()
        whole = replace(recipe, steps=self.whole_steps)
        losses = train_final(student, base, loader, recipe, whole, dict(facts), self.output)
        if ranks()[0]:
            return None
        student.save_pretrained(self.output / "model")
        tokenizer.save_pretrained(self.output / "model")
        scores["hybrid after"] = scores_of(student, tasks)
        names = [task.name for task in tasks]
        write_final_report(self.output, student.config.layer_types, names, scores, losses, facts)
        print(f"report: {self.output}/report.md; model: {self.output}/model")
        return "loss, base and hybrid: " + ", ".join(
            f"{name} {before.loss:.4f} and {after.loss:.4f}"
            for name, before, after in zip(names, scores["base"], scores["hybrid after"])
        )
