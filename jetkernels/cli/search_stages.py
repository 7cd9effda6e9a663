"""What each subcommand of `jetkernels search` does: from options to data, search and report."""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from jetkernels._progress import progress
from jetkernels.model import JetNemotronForCausalLM, Tokenizer
from jetkernels.modules import JetBlock, JetBlockConfig
from jetkernels.postnas import (
    Copy,
    Loader,
    MultipleChoice,
    PlacementOptions,
    Recall,
    Recipe,
    Score,
    ScoreBook,
    SuperNetwork,
    Task,
    TextCorpus,
    export,
    from_pretrained,
    language_modelling,
    ranks,
    search_placement,
    small_base,
    train_base,
    train_super_network,
    write_report,
)
from jetkernels.postnas.base import text_and_tasks, weights_digest
from jetkernels.postnas.blocks import BLOCKS, equal_parameters
from jetkernels.postnas.candidates import Measured, Meter, measure_all, over_seeds
from jetkernels.postnas.data import RowSource
from jetkernels.postnas.design import DESIGNS, DesignedBlock
from jetkernels.postnas.final import train_final
from jetkernels.postnas.report import curve, markdown_table, provenance, write_text
from jetkernels.postnas.selection import write_candidate_report
from jetkernels.postnas.shapes import Shape, equal_cache_grid, write_shape_report

from .search_checks import base_tokenizer, integers_option, placement_of, shape_of


def _corpus(arguments: argparse.Namespace, tokenizer: Tokenizer) -> TextCorpus:
    # The byte-level tokenizer gives each byte its value: taking the bytes themselves is faster.
    byte_level = tokenizer.backend.to_str() == Tokenizer.byte_level().backend.to_str()
    encoder = None if byte_level else tokenizer
    if arguments.text is None:
        corpus = TextCorpus.from_standard_library(encoder)
    else:
        corpus = TextCorpus.from_folder(arguments.text, encoder, arguments.suffix)
    if ranks()[0] == 0:
        print(
            f"text: {corpus.files} files ({corpus.skipped} skipped as no UTF-8 text), {len(corpus.training):,} tokens to train on, "
            f"{len(corpus.held_out):,} held out {corpus.split}"
        )
    if min(len(corpus.training), len(corpus.held_out)) <= arguments.length:
        raise ValueError(
            f"--length {arguments.length} needs more tokens on either side than the text has; give more --text, or a shorter length"
        )
    return corpus


def _recipe(arguments: argparse.Namespace, **changes) -> Recipe:
    return Recipe(arguments.steps, arguments.learning_rate, save_every=arguments.save_every, **changes)


def _tasks(arguments: argparse.Namespace, corpus: TextCorpus, tokenizer: Tokenizer, seed: int = 0) -> list[Task]:
    """Another seed gives other examples of the generated tasks."""
    count, length = arguments.examples, arguments.length
    recall = Recall(corpus.held_out, tokenizer.end_of_text_id, integers_option(arguments, "distances"))
    tasks = [
        recall.task(count, length, seed),
        Copy(corpus.held_out).task(count, length, seed),
        language_modelling(corpus.held_out, count, length, seed),
    ]
    tasks += [MultipleChoice.from_jsonl(path, tokenizer) for path in arguments.questions]
    if arguments.harness:
        from jetkernels.postnas.harness import HarnessTask

        for word in arguments.harness:
            name, _, metric = word.partition(":")
            tasks.append(HarnessTask(name, tokenizer, arguments.harness_limit, metric=metric or "acc"))
    return tasks


def _sources(arguments: argparse.Namespace, corpus: TextCorpus, tokenizer: Tokenizer) -> list[tuple[RowSource, float]]:
    """What training rows are drawn from."""
    mark = tokenizer.end_of_text_id
    recall = Recall(corpus.training, mark, integers_option(arguments, "distances"))
    return text_and_tasks(corpus, mark, arguments.task_share, recall)


# Options that a training does not depend on: it is not repeated when they change.
NOT_TRAINING = {
    "run",
    "stage",
    "stage_run",
    "usage",
    "command",
    "model",
    "whole_steps",
    "output",
    "save_every",
    "text",
    "base",
}
NOT_TRAINING |= {"full", "window", "window_size", "full_task", "window_task", "objective", "width", "exhaustive_up_to"}
NOT_TRAINING |= {
    "examples",
    "questions",
    "harness",
    "harness_limit",
    "seeds",
    "task",
    "placement",
    "state",
    "heads",
    "keys",
}
NOT_TRAINING |= {"only", "min_throughput", "min_share", "speed_batch", "speed_prompt", "speed_tokens"}


def _facts(
    arguments: argparse.Namespace, corpus: TextCorpus, base: JetNemotronForCausalLM | None = None
) -> list[tuple[str, object]]:
    """What a training depends on, for the report and to recognise checkpoints: options, digests of text and base."""
    facts = sorted((k, v) for k, v in vars(arguments).items() if k not in NOT_TRAINING)
    return [*facts, ("text", corpus.digest), *([("base", weights_digest(base))] if base is not None else [])]


def _task_facts(arguments: argparse.Namespace) -> list[tuple[str, object]]:
    """What the scores depend on beside the training."""
    questions = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in arguments.questions]
    harness = [(name, f"harness, limit {arguments.harness_limit}") for name in arguments.harness]
    return [("window_size", arguments.window_size), ("examples", arguments.examples), *questions, *harness]


def run_base(arguments: argparse.Namespace) -> str | None:
    tokenizer = Tokenizer.byte_level()
    corpus = _corpus(arguments, tokenizer)
    model = small_base(
        arguments.layers,
        arguments.seed,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
    ).to(arguments.device)
    model.model.recompute_layers = arguments.recompute
    losses = train_base(
        model,
        corpus,
        _recipe(arguments, weight_decay=0.1),
        batch_size=arguments.batch,
        length=arguments.length,
        task_share=arguments.task_share,
        distances=integers_option(arguments, "distances"),
        mark=tokenizer.end_of_text_id,
        seed=arguments.seed,
        checkpoint=arguments.output / "base.ckpt",
    )
    if ranks()[0]:
        return None
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    mark, count, length = tokenizer.end_of_text_id, 64, arguments.length
    recall = Recall(corpus.held_out, mark, integers_option(arguments, "distances")).task(count, length)
    tasks = [recall, Copy(corpus.held_out).task(count, length), language_modelling(corpus.held_out, count, length)]
    rows = [[task.name, score.loss, score.accuracy] for task in tasks for score in [_score(task, model)]]
    text = [
        "# Base model\n",
        f"{model.config.num_hidden_layers} layers of full attention, width {model.config.hidden_size}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters; trained on {len(losses) * arguments.batch * length:,} tokens.\n",
        "On held-out text, loss in nats per token of the right answer:\n",
        markdown_table(["task", "loss", "accuracy"], rows),
    ]
    if losses:
        curve(arguments.output / "loss.png", losses, "base: text, recall and copying", "nats per token")
        text.append("![training](loss.png)\n")
    text += ["## Provenance\n", provenance(_facts(arguments, corpus))]
    write_text(arguments.output / "report.md", "\n".join(text))
    summary = ", ".join(f"{name} {loss:.4f}" for name, loss, _ in rows)
    print(f"held out, nats per token: {summary}; model and report: {arguments.output}/")
    return f"held out, nats per token: {summary}"


def _score(task: Task, model: JetNemotronForCausalLM) -> Score:
    return task.score(lambda ids: model(ids.to(model.device)).logits)


def load_base(folder: Path, device: str) -> tuple[JetNemotronForCausalLM, Tokenizer]:
    """Base and tokenizer of a folder. In fp32 whatever is stored: the paths beside it are trained in the base's
    dtype.
    """
    tokenizer = base_tokenizer(folder)
    return from_pretrained(
        folder, dtype=torch.float32, device=device, progress=partial(progress, desc="loading base")
    ), tokenizer


def run_placement(arguments: argparse.Namespace) -> str | None:
    base, tokenizer = load_base(arguments.base, arguments.device)
    corpus = _corpus(arguments, tokenizer)
    network = SuperNetwork(
        base, shape_of(arguments.shape).config(), arguments.window_size, arguments.seed, arguments.recompute
    )
    options = PlacementOptions(
        arguments.full,
        arguments.window,
        arguments.full_task,
        arguments.window_task,
        arguments.objective,
        arguments.width,
        arguments.exhaustive_up_to,
    )
    loader = Loader(_sources(arguments, corpus, tokenizer), arguments.batch, arguments.length + 1, arguments.seed)
    facts, asked = _facts(arguments, corpus, base), _task_facts(arguments)
    output = arguments.output
    tasks = _tasks(arguments, corpus, tokenizer)
    options.check(network.num_layers, [task.name for task in tasks])
    losses = train_super_network(network, loader, _recipe(arguments), dict(facts), output / "super_network.ckpt")
    book = ScoreBook(network, tasks, dict(facts + asked), output / "scores.ckpt")
    result = search_placement(book, options, losses)
    if ranks()[0]:
        return None
    unseen = _tasks(arguments, corpus, tokenizer, seed=1)
    fresh = ScoreBook(network, unseen, dict([*facts, *asked, ("examples seed", 1)]), output / "fresh_scores.ckpt")
    write_report(output, book, result, options, facts + asked, fresh)
    export(network, result.placement, output / "model", tokenizer)
    print(f"placement: {' '.join(result.placement)}")
    print(
        f"report: {output}/report.md; model: {output}/model (try: jetkernels generate --model {output}/model --prompt 'def ')"
    )
    return f"`{' '.join(result.placement)}`"


@dataclass(frozen=True)
class Comparison:
    """What stages 2, 3 and 4 share: the measured candidates, and what the report says about them."""

    rows: list[Measured]
    meter: Meter
    tokenizer: Tokenizer
    facts: list[tuple[str, object]]


def _compare(
    arguments: argparse.Namespace,
    names: Sequence[str],
    block: Callable[[str], JetBlockConfig | Callable[[int], torch.nn.Module]],
) -> Comparison:
    """Trains and measures the candidates `names`; block: name -> what `SuperNetwork` takes as its linear paths."""
    base, tokenizer = load_base(arguments.base, arguments.device)
    for name in names:
        # One that cannot be built is refused before any is trained.
        paths = block(name)
        with torch.device("meta"):
            JetBlock(base.config.hidden_size, paths) if isinstance(paths, JetBlockConfig) else paths(
                base.config.hidden_size
            )
    corpus = _corpus(arguments, tokenizer)
    facts, placement = _facts(arguments, corpus, base), placement_of(arguments)
    settings = ("task", "objective", "seeds", "speed_batch", "speed_prompt", "speed_tokens")
    asked = (
        _task_facts(arguments)
        + [(name, getattr(arguments, name)) for name in settings]
        + [("placement", " ".join(placement))]
    )
    meter = Meter(
        lambda name, seed: SuperNetwork(base, block(name), arguments.window_size, seed, arguments.recompute),
        placement,
        Loader(_sources(arguments, corpus, tokenizer), arguments.batch, arguments.length + 1),
        _recipe(arguments),
        _tasks(arguments, corpus, tokenizer),
        dict(facts),
        arguments.task,
        arguments.objective,
        arguments.speed_batch,
        arguments.speed_prompt,
        arguments.speed_tokens,
        folder=arguments.output / "training",
    )
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    rows = measure_all(names, meter, dict(facts + asked), arguments.output / "candidates.ckpt", seeds)
    return Comparison(rows, meter, tokenizer, facts + asked)


def _quality(arguments: argparse.Namespace) -> str:
    return f"{arguments.task}, {'minus the loss' if arguments.objective == 'loss' else 'accuracy'}"


def _report_comparison(
    arguments: argparse.Namespace, found: Comparison, title: str, pair: tuple[str, str] | None = None
) -> str | None:
    if ranks()[0]:
        return None
    best = write_candidate_report(arguments.output, title, found.rows, pair, _quality(arguments), found.facts)
    print(f"best: {best.name}; report: {arguments.output}/report.md")
    return f"best {_quality(arguments)}: {best.name}, {best.quality:.4f}"


def run_blocks(arguments: argparse.Namespace) -> str | None:
    shape = shape_of(arguments.shape)

    def block(name: str) -> Callable[[int], torch.nn.Module]:
        kind = BLOCKS[name]
        if arguments.equal == "state":
            return lambda size: kind(size, shape)
        return lambda size: kind(size, equal_parameters(kind, size, shape))

    found = _compare(arguments, arguments.only or list(BLOCKS), block)
    return _report_comparison(
        arguments, found, f"Linear-attention blocks of equal {arguments.equal}", ("JetBlock", "Mamba2")
    )


def run_design(arguments: argparse.Namespace) -> str | None:
    shape, names = shape_of(arguments.shape), arguments.only or list(DESIGNS)
    found = _compare(arguments, names, lambda name: lambda size: DesignedBlock(size, shape, DESIGNS[name]))
    return _report_comparison(arguments, found, "Design of the JetBlock")


def run_shapes(arguments: argparse.Namespace) -> str | None:
    grid = equal_cache_grid(arguments.state, integers_option(arguments, "heads"), integers_option(arguments, "keys"))
    found = _compare(arguments, [shape.name for shape in grid], lambda name: Shape.from_name(name).config())
    if ranks()[0]:
        return None
    fastest = max(row.generation_per_second for row in over_seeds(found.rows))
    minimum = arguments.min_share * fastest if arguments.min_throughput is None else arguments.min_throughput
    best = write_shape_report(arguments.output, found.rows, minimum, _quality(arguments), found.facts)
    network, _ = found.meter.train(best.name, arguments.seed)
    export(network, found.meter.placement, arguments.output / "model", found.tokenizer)
    print(f"best: {best.name} (KxVxH); report: {arguments.output}/report.md; model: {arguments.output}/model")
    return f"chosen (KxVxH): {best.name}"


def run_final(arguments: argparse.Namespace) -> str | None:
    base, tokenizer = load_base(arguments.base, arguments.device)
    student = JetNemotronForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, device=arguments.device)
    student.model.recompute_layers = arguments.recompute
    corpus = _corpus(arguments, tokenizer)
    loader = Loader(_sources(arguments, corpus, tokenizer), arguments.batch, arguments.length + 1, arguments.seed)
    tasks, facts = _tasks(arguments, corpus, tokenizer), _facts(arguments, corpus, base)

    def scores(model: JetNemotronForCausalLM) -> list[float]:
        return [value for task in tasks for score in [_score(task, model)] for value in (score.loss, score.accuracy)]

    rows = [["base", *scores(base)], ["hybrid before", *scores(student)]]
    recipe = _recipe(arguments)
    whole = replace(recipe, steps=arguments.whole_steps)
    parts = train_final(student, base, loader, recipe, whole, dict(facts), arguments.output)
    if ranks()[0]:
        return None
    student.save_pretrained(arguments.output / "model")
    tokenizer.save_pretrained(arguments.output / "model")
    rows.append(["hybrid after", *scores(student)])
    header = ["model", *(f"{task.name}, {what}" for task in tasks for what in ("loss", "accuracy"))]
    text = ["# Final training\n", f"Layers: `{' '.join(student.config.layer_types)}`\n", markdown_table(header, rows)]
    for name, losses, label in zip(("distillation", "whole"), parts, ("KL to the base, nats", "nats per token")):
        if losses:
            curve(arguments.output / f"{name}.png", losses, name, label)
            text.append(f"![{name}]({name}.png)\n")
    write_text(arguments.output / "report.md", "\n".join([*text, "## Provenance\n", provenance(facts)]))
    print(f"report: {arguments.output}/report.md; model: {arguments.output}/model")
    return "loss, base and hybrid: " + ", ".join(
        f"{task.name} {rows[0][1 + 2 * i]:.4f} and {rows[-1][1 + 2 * i]:.4f}" for i, task in enumerate(tasks)
    )
