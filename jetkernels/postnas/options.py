"""What the stages are told: a class for what all of them share, and one for each thing that several do.

The fields are the options of `jetkernels search`, by their names, which messages use too; their defaults are here.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch

from jetkernels.model import JetNemotronForCausalLM, Tokenizer

from .base import SMALL, text_and_tasks, weights_digest
from .continuations import continuations
from .data import Loader, RowSource, TextCorpus
from .precision import chosen_precision
from .shapes import Shape
from .super_network import SuperNetwork
from .tasks import Copy, MultipleChoice, Task, language_modelling, recall_of
from .teacher import Teacher
from .training import Recipe, ranks

Facts = list[tuple[str, object]]
LOGITS = 2**26  # that a task asks for at once, at most: 256 MiB in fp32
# What the values of an objective are, in words.
OBJECTIVE_NAMES = {"loss": "minus the loss", "accuracy": "accuracy"}


class Integers(tuple[int, ...]):
    """Several integers; as text, with commas between them."""

    def __str__(self) -> str:
        return ",".join(map(str, self))


def plain(value: object) -> object:
    """An option's value as JSON and the tables of reports have it: a shape and several integers are text."""
    if isinstance(value, Shape):
        return value.name
    return str(Integers(value)) if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True, kw_only=True)
class StageOptions(ABC):
    """What every stage is told: the text, the rows made of it, and the training.

    Attributes:
        output: folder for model, report and checkpoints.
        text: folder of text files; None: the source of Python's standard library.
        suffix: only the files of `text` whose names end so are read.
        steps: of the training.
        learning_rate: its peak.
        batch: rows of a step, over all ranks.
        length: positions of a row.
        task_share: of the rows: recall and copying.
        distances: of the recall task, tokens.
        save_every: steps between two checkpoints.
        recompute: keep only the layers' inputs for the backward pass.
        device: cpu, cuda or cuda:N.
        seed: of initial values and rows.
        TRAINING: names of a class's own options that the training depends on (`training_options`).
    """

    TRAINING: ClassVar[tuple[str, ...]] = (
        *("batch", "device", "distances", "learning_rate", "length"),
        *("recompute", "seed", "steps", "suffix", "task_share"),
    )

    output: Path
    text: Path | None = None
    suffix: str = ""
    steps: int = 500
    learning_rate: float = 3e-3
    batch: int = 8
    length: int = 128
    task_share: float = 0.5
    distances: Integers = Integers((8, 24, 48))
    save_every: int = 50
    recompute: bool = False
    device: str = "cpu"
    seed: int = 0

    @abstractmethod
    def run(self) -> str | None:
        """Runs the stage, or what is left of it. Returns, on rank 0, what it found, in a sentence."""

    @classmethod
    def training_options(cls) -> list[str]:
        """Names of the options that the training depends on: a run goes on only where they are the same."""
        return sorted({name for kind in cls.__mro__ for name in getattr(kind, "TRAINING", ())})

    def named(self, names: Sequence[str]) -> Facts:
        """(name, value) of the options `names`, as checkpoints and reports hold them."""
        return [(name, plain(getattr(self, name))) for name in names]

    def facts(self, corpus: TextCorpus, base: JetNemotronForCausalLM | None = None) -> Facts:
        """What the training depends on, for the report and to recognise checkpoints."""
        facts = [*self.named(self.training_options()), ("text", corpus.digest)]
        return [*facts, ("base", weights_digest(base))] if base is not None else facts

    def corpus(self, tokenizer: Tokenizer, vocab_size: int) -> TextCorpus:
        """The text, encoded; rank 0 says what was read.

        Raises:
            ValueError: it is too short for a row, or has tokens that the base's vocabulary does not have.
        """
        # The byte-level tokenizer gives each byte its value: taking the bytes themselves is faster.
        encoder = None if tokenizer.is_byte_level else tokenizer
        if self.text is None:
            corpus = TextCorpus.from_standard_library(encoder)
        else:
            corpus = TextCorpus.from_folder(self.text, encoder, self.suffix)
        if ranks()[0] == 0:
            print(
                f"text: {corpus.files} files ({corpus.skipped} skipped as no UTF-8 text), "
                f"{len(corpus.training):,} tokens to train on, {len(corpus.held_out):,} held out {corpus.split}"
            )
        if min(len(corpus.training), len(corpus.held_out)) <= self.length:
            raise ValueError(
                f"--length {self.length} needs more tokens on either side than the text has; "
                "give more --text, or a shorter length"
            )
        if (most := int(max(corpus.training.max(), corpus.held_out.max()))) >= vocab_size:
            raise ValueError(
                f"base: the tokens of the text must be below its vocabulary size {vocab_size}, got {most} from its "
                f"tokenizer, which has {tokenizer.vocab_size}"
            )
        return corpus

    def recipe(self, weight_decay: float = 0.0) -> Recipe:
        """How the parameters are trained."""
        return Recipe(self.steps, self.learning_rate, weight_decay=weight_decay, save_every=self.save_every)

    def sources(self, corpus: TextCorpus, tokenizer: Tokenizer) -> list[tuple[RowSource, float]]:
        """What training rows are drawn from, with the share of each."""
        return text_and_tasks(corpus, self.task_share, recall_of(corpus.training, tokenizer, self.distances))

    def loader(self, corpus: TextCorpus, tokenizer: Tokenizer) -> Loader:
        """The training rows."""
        return Loader(self.sources(corpus, tokenizer), self.batch, self.length + 1, self.seed)

    def held_out_tasks(self, corpus: TextCorpus, tokenizer: Tokenizer, count: int, seed: int = 0) -> list[Task]:
        """Recall, copying and language modelling on the held-out text.

        Args:
            corpus: the text.
            tokenizer: that encoded it.
            count: examples of each task, of recall at each distance.
            seed: another one gives other examples.
        """
        tasks = [
            recall_of(corpus.held_out, tokenizer, self.distances).task(count, self.length, seed),
            Copy(corpus.held_out).task(count, self.length, seed),
            language_modelling(corpus.held_out, count, self.length, seed),
        ]
        most = LOGITS // (self.length * tokenizer.backend.get_vocab_size())
        return [replace(task, batch_size=max(1, min(task.batch_size, most))) for task in tasks]


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(StageOptions):
    """In what dtype the base and what is trained beside it multiply.

    Attributes:
        precision: "fp32", "bf16" or "auto" (`precision.chosen_precision`).
    """

    precision: str = "auto"

    def facts(self, corpus: TextCorpus, base: JetNemotronForCausalLM | None = None) -> Facts:
        """What the training depends on; of the precision, what was chosen."""
        chosen = [("precision", chosen_precision(self.precision, base))] if base is not None else []
        return [*chosen, *super().facts(corpus, base)]


@dataclass(frozen=True, kw_only=True)
class DistillOptions(PrecisionOptions):
    """How the paths of a super network are trained.

    Attributes:
        layer_steps: in front of `steps`, so many in which each path is trained on the base's own input of its layer.
        train_attention: train a copy of the base's attention too, where a path has it.
    """

    TRAINING: ClassVar[tuple[str, ...]] = ("layer_steps", "train_attention")

    layer_steps: int = 0
    train_attention: bool = False

    def recipe(self, weight_decay: float = 0.0) -> Recipe:
        """How the parameters are trained, in the steps of both kinds."""
        return replace(super().recipe(weight_decay), steps=self.layer_steps + self.steps)

    def teacher(self, base: JetNemotronForCausalLM) -> Teacher:
        """The base, and what it computes for those that learn from it."""
        return Teacher(base, chosen_precision(self.precision, base))


@dataclass(frozen=True, kw_only=True)
class StartOptions(StageOptions):
    """From what the JetBlocks of a super network begin.

    Attributes:
        start: "random", or "warm": from the attention that they replace (`warm_start`).
    """

    TRAINING: ClassVar[tuple[str, ...]] = ("start",)

    start: str = "random"

    def begin(self, network: SuperNetwork, loader: Loader) -> None:
        """Gives the paths of a network the first values that were asked for."""
        if self.start == "warm":
            rows = [loader.batch(0)[:, :-1]]
            while sum(part.numel() for part in rows) < network.base.config.hidden_size:
                rows.append(loader.batch(len(rows))[:, :-1])
            network.warm_start_(torch.cat(rows).to(network.base.device))


@dataclass(frozen=True, kw_only=True)
class SizeOptions(StageOptions):
    """Sizes of the small base that is trained where there is none.

    Attributes:
        layers: how many there are.
        hidden_size: C.
        intermediate_size: of the MLPs.
    """

    TRAINING: ClassVar[tuple[str, ...]] = ("hidden_size", "intermediate_size", "layers")

    layers: int = 6
    hidden_size: int = SMALL["hidden_size"]
    intermediate_size: int = SMALL["intermediate_size"]


@dataclass(frozen=True, kw_only=True)
class TaskOptions(StageOptions):
    """What models are scored by.

    Attributes:
        examples: of each task, of recall at each distance.
        continuations: questions which sentence comes next, another task; 0: none.
        questions: files of multiple-choice questions, each a task.
        harness: NAME or NAME:METRIC of tasks of lm-evaluation-harness.
        harness_limit: questions of each of these; None: all.
    """

    examples: int = 64
    continuations: int = 0
    questions: Sequence[Path] = field(default_factory=list)
    harness: Sequence[str] = field(default_factory=list)
    harness_limit: int | None = None

    def tasks(self, corpus: TextCorpus, tokenizer: Tokenizer, seed: int = 0) -> list[Task]:
        """All tasks; another seed gives other examples of the generated ones."""
        tasks = self.held_out_tasks(corpus, tokenizer, self.examples, seed)
        if self.continuations:
            tasks.append(continuations(corpus.held_out, tokenizer, self.continuations, seed=seed))
        tasks += [MultipleChoice.from_jsonl(path, tokenizer) for path in self.questions]
        if self.harness:
            from .harness import HarnessTask

            for word in self.harness:
                name, _, metric = word.partition(":")
                tasks.append(HarnessTask(name, tokenizer, self.harness_limit, metric=metric or "acc"))
        return tasks


@dataclass(frozen=True, kw_only=True)
class OutcomeOptions(StageOptions):
    """What the report of the final training holds beside the scores.

    Attributes:
        evaluate_every: steps between two losses on held-out text.
        prompts: file of prompts that base and hybrid complete, one a line; None: `completions.FIXED`. Windows of the
            held-out text come on top.
        context: tokens behind which both are timed.
    """

    evaluate_every: int = 50
    prompts: Path | None = None
    context: int = 8192


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(TaskOptions):
    """How placements and candidates are scored.

    Attributes:
        window_size: tokens of a sliding window, the current one included.
    """

    window_size: int = 32

    def score_facts(self) -> Facts:
        """What the scores depend on beside the training."""
        questions = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in self.questions]
        harness = [(name, f"harness, limit {self.harness_limit}") for name in self.harness]
        return [*self.named(("window_size", "examples", "continuations")), *questions, *harness]


@dataclass(frozen=True, kw_only=True)
class SearchOptions(ScoreOptions):
    """Which placement is searched for; `placement.PlacementOptions` says more.

    Attributes:
        full: layers that keep full attention.
        window: layers that get sliding-window attention.
        full_task: name of the task that places full attention.
        full_objective: "loss" (minus the loss of the right answer) or "accuracy" in it.
        window_task: name of the task that places windows.
        window_objective: the same in it.
        width: of the beam.
        exhaustive_up_to: placements that are all evaluated.
        budgets: other numbers of full layers, for the report's curve.
    """

    full: int = 2
    budgets: Integers = Integers(())
    window: int = 0
    full_task: str = "recall"
    full_objective: str = "loss"
    window_task: str = "language modelling"
    window_objective: str = "loss"
    width: int = 4
    exhaustive_up_to: int = 64


@dataclass(frozen=True, kw_only=True)
class QualityOptions(ScoreOptions):
    """What the quality of a candidate of stages 2 to 4 is.

    Attributes:
        task: name of the task whose objective it is.
        objective: "loss" (minus the loss of the right answer) or "accuracy".
        seeds: of every candidate; the tables hold means.
    """

    task: str = "language modelling"
    objective: str = "loss"
    seeds: int = 1

    @property
    def quality(self) -> str:
        """What the quality is, in words."""
        return f"{self.task}, {OBJECTIVE_NAMES[self.objective]}"


@dataclass(frozen=True, kw_only=True)
class ShapeOptions(StageOptions):
    """Sizes of the linear blocks.

    Attributes:
        shape: K, V and H.
    """

    TRAINING: ClassVar[tuple[str, ...]] = ("shape",)

    shape: Shape = Shape(16, 32, 4)
