"""The stages of the search, from options to a model and a report: what each subcommand of `jetkernels search` runs.

A stage draws rows from the text, trains, scores, and hands what it found to its report. Killed, it goes on from its
checkpoints when it is run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from jetkernels._progress import progress
from jetkernels.model import JetNemotronForCausalLM, Tokenizer
from jetkernels.model.gguf_file import is_gguf
from jetkernels.model.speed import decode_speed
from jetkernels.model.tokenizer import TOKENIZER_FILE

from .base import from_pretrained, pretrained_path, small_base, train_base, weights_digest
from .completions import FIXED, complete, prompts_of, read_prompts
from .costs import cost_of, write_cost
from .data import TextCorpus, end_of_text
from .final import AFTER, BASE, BEFORE, TEXT, Outcome, train_final
from .hybrid import is_hybrid, load_student, read_path, save_hybrid
from .linear_path import JET, LinearPath
from .options import (
    DistillOptions,
    Facts,
    OutcomeOptions,
    PrecisionOptions,
    SearchOptions,
    ShapeOptions,
    SizeOptions,
    StartOptions,
    TaskOptions,
)
from .placement import PlacementOptions, ScoreBook, export, search_placement, train_super_network
from .precision import chosen_precision, computing
from .report.base import write_base_report
from .report.final import write_final_report
from .report.placement import read_budgets, write_report
from .report.tables import not_exported
from .super_network import SuperNetwork
from .tasks import Score, Task
from .training import ranks


def base_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a base; it has the token that marks the recall task's keys.

    Raises:
        FileNotFoundError: the base has no tokenizer.
        ValueError: it is damaged, or has no such token.
    """
    if not is_gguf(folder) and not (folder / TOKENIZER_FILE).is_file():
        raise FileNotFoundError(f"base: {folder} has no {TOKENIZER_FILE}")
    tokenizer = Tokenizer.from_pretrained(folder)
    try:
        end_of_text(tokenizer)
    except ValueError as error:
        raise ValueError(f"base: {error} ({folder})") from None
    return tokenizer


def load_base(folder: Path, device: str) -> tuple[JetNemotronForCausalLM, Tokenizer]:
    """Base and tokenizer of a folder or a GGUF file.

    In fp32 whatever is stored: the paths beside it are trained in the base's dtype.
    """
    tokenizer = base_tokenizer(folder)
    loading = partial(progress, desc="loading base")
    return from_pretrained(folder, dtype=torch.float32, device=device, progress=loading), tokenizer


def scores_of(model: JetNemotronForCausalLM, tasks: Sequence[Task], precision: str = "fp32") -> list[Score]:
    """The score of a model in each task."""
    with computing(precision, model.device):
        return [task.score(lambda ids: model(ids.to(model.device)).logits) for task in tasks]


@dataclass(frozen=True, kw_only=True)
class BaseStage(SizeOptions):
    """Makes the model that a search starts from: full attention in every layer.

    A small one is trained on real text, to search on a CPU; or a pre-trained one is taken, and nothing is trained.

    Attributes:
        pretrained: a name in `base.PACKAGES`, a folder or a GGUF file; None: a small one is trained.
        FOR_TRAINING: names of the options that mean nothing where nothing is trained.
    """

    FOR_TRAINING = (
        *("layers", "hidden_size", "intermediate_size", "steps", "learning_rate", "batch", "task_share"),
        *("save_every", "recompute", "seed"),
    )
    EXAMPLES = 64  # of each task that the report names

    steps: int = 4000
    batch: int = 16
    pretrained: str | None = None

    def run(self) -> str | None:
        """Writes the model, its tokenizer and the report to `output`."""
        return self._train() if self.pretrained is None else self._take(self.pretrained)

    def _train(self) -> str | None:
        tokenizer = Tokenizer.byte_level()
        model = small_base(
            self.layers, self.seed, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size
        ).to(self.device)
        corpus = self.corpus(tokenizer, model.config.vocab_size)
        model.model.recompute_layers = self.recompute
        losses = train_base(
            model,
            corpus,
            self.recipe(weight_decay=0.1),
            batch_size=self.batch,
            length=self.length,
            task_share=self.task_share,
            distances=self.distances,
            mark=end_of_text(tokenizer),
            seed=self.seed,
            checkpoint=self.output / "base.ckpt",
        )
        if ranks()[0]:
            return None
        write_cost(self.output, cost_of([losses]))
        return self._write(model, tokenizer, corpus, self.facts(corpus), losses)

    def _take(self, pretrained: str) -> str | None:
        if ranks()[0]:
            return None
        path = pretrained_path(pretrained)
        tokenizer = base_tokenizer(path)
        model = from_pretrained(path, device=self.device, progress=partial(progress, desc="loading base"))
        corpus = self.corpus(tokenizer, model.config.vocab_size)
        facts = [*self.named(("pretrained", "device", "distances", "length")), ("text", corpus.digest)]
        return self._write(model, tokenizer, corpus, [*facts, ("base", weights_digest(model))], None)

    def _write(
        self,
        model: JetNemotronForCausalLM,
        tokenizer: Tokenizer,
        corpus: TextCorpus,
        facts: Facts,
        losses: Sequence[float] | None,
    ) -> str:
        """Model, tokenizer and report; losses: of the training, None if there was none."""
        model.save_pretrained(self.output)
        tokenizer.save_pretrained(self.output)
        tasks = self.held_out_tasks(corpus, tokenizer, self.EXAMPLES)
        scores = dict(zip((task.name for task in tasks), scores_of(model, tasks)))
        tokens = None if losses is None else len(losses) * self.batch * self.length
        write_base_report(self.output, model, scores, losses or [], tokens, facts)
        found = "held out, nats per token: " + ", ".join(f"{name} {score.loss:.4f}" for name, score in scores.items())
        print(f"{found}; model and report: {self.output}/")
        return found


@dataclass(frozen=True, kw_only=True)
class PlacementStage(SearchOptions, ShapeOptions, DistillOptions, StartOptions):
    """Stage 1: which layers keep full attention, which get a sliding window.

    Attributes:
        base: folder of the base, or a GGUF file.
        linear_path: name of the block beside the attention of each layer.
    """

    TRAINING: ClassVar[tuple[str, ...]] = ("linear_path",)

    base: Path
    steps: int = 600
    linear_path: str = JET

    def run(self) -> str | None:
        """Writes the placement, its report and the model that it makes to `output`."""
        base, tokenizer = load_base(self.base, self.device)
        corpus = self.corpus(tokenizer, base.config.vocab_size)
        path = LinearPath(self.shape, self.linear_path)
        teacher = self.teacher(base)
        network = SuperNetwork(
            base, path.paths(), self.window_size, self.seed, self.recompute, self.train_attention, teacher
        )
        options = PlacementOptions(
            full_layers=self.full,
            window_layers=self.window,
            full_task=self.full_task,
            window_task=self.window_task,
            full_objective=self.full_objective,
            window_objective=self.window_objective,
            width=self.width,
            exhaustive_up_to=self.exhaustive_up_to,
            budgets=self.budgets,
        )
        loader = self.loader(corpus, tokenizer)
        self.begin(network, loader)
        facts, asked = self.facts(corpus, base), self.score_facts()
        tasks = self.tasks(corpus, tokenizer)
        options.check(network.num_layers, [task.name for task in tasks])
        output = self.output
        trained = output / "super_network.ckpt"
        losses = train_super_network(network, loader, self.recipe(), dict(facts), trained, layer_steps=self.layer_steps)
        book = ScoreBook(network, tasks, dict(facts + asked), output / "scores.ckpt")
        result = search_placement(book, options, losses)
        if ranks()[0]:
            return None
        write_cost(output, cost_of([losses]))
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


@dataclass(frozen=True, kw_only=True)
class FinalStage(TaskOptions, PrecisionOptions, OutcomeOptions):
    """Stage 5: trains the found hybrid, first its token mixers by distillation, then all of it.

    Attributes:
        base: folder of the base, the teacher, or a GGUF file.
        model: folder of the hybrid that an earlier stage exported, or kept where it could not.
        placement_folder: of stage 1, whose scores by the number of full layers the report holds the hybrid against.
        whole_steps: of the whole model, after `steps` of distillation.
        whole_learning_rate: its peak in these; None: `learning_rate`.
    """

    EXAMPLES_SEED = 1  # the examples on which stage 1 compares placements: the search has chosen by none of them

    base: Path
    model: Path
    placement_folder: Path | None = None
    whole_steps: int = 500
    whole_learning_rate: float | None = None

    def run(self) -> str | None:
        """Writes the trained model and the report to `output`."""
        base, tokenizer = load_base(self.base, self.device)
        path = read_path(self.model) if is_hybrid(self.model) else None
        student = load_student(self.model, base)
        student.model.recompute_layers = self.recompute
        corpus = self.corpus(tokenizer, base.config.vocab_size)
        loader = self.loader(corpus, tokenizer)
        tasks = self.tasks(corpus, tokenizer, self.EXAMPLES_SEED)
        facts = [*self.facts(corpus, base), *self.named(("examples",))]
        precision = chosen_precision(self.precision, base)
        text = next(task for task in tasks if task.name == TEXT)

        def scored(model: JetNemotronForCausalLM) -> dict[str, Score]:
            return dict(zip((task.name for task in tasks), scores_of(model, tasks, precision)))

        scores = {BASE: scored(base), BEFORE: scored(student)}
        recipe = self.recipe()
        losses = train_final(
            student,
            base,
            loader,
            recipe,
            replace(recipe, steps=self.whole_steps, learning_rate=self.whole_learning_rate or self.learning_rate),
            dict(facts),
            self.output,
            precision,
            held_out=lambda: scores_of(student, [text], precision)[0].loss,
            held_out_every=self.evaluate_every,
        )
        if ranks()[0]:
            return None
        write_cost(self.output, cost_of(losses))
        model, kinds = self.output / "model", student.config.layer_types
        if path is None:
            student.save_pretrained(model)
            tokenizer.save_pretrained(model)
        else:
            window = student.config.section("swa")["window_size"]
            save_hybrid(model, student, tuple(kinds), path, window)
        scores[AFTER] = scored(student)
        prompts = prompts_of(self.texts(), corpus.held_out, tokenizer)
        outcome = Outcome(
            layer_types=kinds,
            linear=None if path is None else str(path),
            scores=scores,
            losses=losses,
            completions=complete(base, student, prompts, tokenizer),
            context=self.context,
            speeds={name: decode_speed(one, self.context) for name, one in ((BASE, base), (AFTER, student))},
            files=model,
        )
        budgets = [] if self.placement_folder is None else read_budgets(self.placement_folder)
        write_final_report(
            self.output,
            outcome,
            budgets,
            [*facts, *self.named(("whole_steps", "whole_learning_rate", "evaluate_every"))],
        )
        linear = outcome.linear
        what = f"model: {model}" if linear is None else f"weights: {model}. {not_exported(linear)}"
        print(f"report: {self.output}/report.md; {what}")
        return "loss, base and hybrid: " + ", ".join(
            f"{name} {before.loss:.4f} and {scores[AFTER][name].loss:.4f}" for name, before in scores[BASE].items()
        )

    def texts(self) -> Sequence[str]:
        """The prompts that are no windows of the text."""
        return FIXED if self.prompts is None else read_prompts(self.prompts)
