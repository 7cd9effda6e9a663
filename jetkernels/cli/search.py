"""PostNAS (arXiv 2508.15884, section 2): search for the hybrid that a trained full-attention model becomes.

One subcommand per stage, and `all` for the pipeline. Each writes into its output folder a report (report.md with plots),
checkpoints from which the same command goes on after it was killed, and the model it made, if it makes one. Runs in one
process, or data-parallel under torchrun:

torchrun --standalone --nproc-per-node 2 -m jetkernels search placement ...
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from jetkernels.model import JetNemotronForCausalLM, Tokenizer
from jetkernels.model.tokenizer import TOKENIZER_FILE
from jetkernels.modules import JetBlockConfig
from jetkernels.postnas import (
    OBJECTIVES,
    Copy,
    Loader,
    MultipleChoice,
    PlacementOptions,
    Recall,
    Recipe,
    ScoreBook,
    SuperNetwork,
    Task,
    TextCorpus,
    export,
    from_pretrained,
    join_ranks,
    language_modelling,
    ranks,
    search_placement,
    small_base,
    train_base,
    train_super_network,
    write_report,
)
from jetkernels.postnas.base import text_and_tasks, weights_digest
from jetkernels.postnas.blocks import BLOCKS
from jetkernels.postnas.candidates import Measured, Meter, measure_all
from jetkernels.postnas.design import DESIGNS, DesignedBlock
from jetkernels.postnas.final import train_final
from jetkernels.postnas.report import curve, markdown_table, provenance, write_text
from jetkernels.postnas.selection import write_candidate_report
from jetkernels.postnas.shapes import Shape, equal_cache_grid, write_shape_report
from jetkernels.postnas.training import wait_for_ranks


def stages() -> dict[str, tuple[str, Callable, Callable]]:
    """Name of a stage -> what it does, adds its options, runs it; in the order of the pipeline."""
    return {
        "base": ("train a small full-attention model on real text, to search on a CPU", _add_base, run_base),
        "placement": ("stage 1: which layers keep full attention, which get a sliding window", _add_placement, run_placement),
        "blocks": ("stage 2: linear-attention blocks side by side, at equal cache", _add_blocks, run_blocks),
        "design": ("stage 3: the JetBlock with one choice of its design changed at a time", _add_design, run_design),
        "shapes": ("stage 4: K, V and H of the JetBlocks, at equal cache and sufficient generation speed", _add_shapes, run_shapes),
        "final": ("stage 5: train the found hybrid, first its token mixers by distillation, then all of it", _add_final, run_final),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subcommands = parser.add_subparsers(dest="stage", required=True, metavar="stage")
    for name, (summary, add, function) in stages().items():
        stage = subcommands.add_parser(name, help=summary, description=summary)
        stage.add_argument("--output", type=Path, required=True, help="folder for model, report and checkpoints")
        _add_training(stage)
        add(stage)
        stage.set_defaults(stage_run=function)
    summary = "the whole pipeline: every stage in order, each in a folder of its own below --output"
    whole = subcommands.add_parser("all", help=summary, description=summary)
    whole.add_argument("--output", type=Path, required=True, help="folder for the folders of the stages")
    whole.add_argument("--base", type=Path, help="folder of a base (default: train a small one)")
    whole.add_argument("--full", type=int, default=2, help="layers that keep full attention (default 2)")
    whole.add_argument("--window", type=int, default=0, help="layers that get sliding-window attention (default 0)")
    whole.add_argument("--layers", type=int, default=6, help="of the small base (default 6)")
    whole.add_argument("--shape", default="32x64x4", help="KxVxH of the linear blocks; the grid keeps their state (default 32x64x4)")
    whole.add_argument("--examples", type=int, default=64, help="of each task (default 64)")
    _add_training(whole)
    whole.set_defaults(stage_run=run_all)


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, help="folder of text files (default: the source of Python's standard library)")
    parser.add_argument("--suffix", default="", help="read only the files of --text whose names end so, such as .md")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default 1000)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak (default 0.002)")
    parser.add_argument("--batch", type=int, default=8, help="rows of a training step, over all ranks (default 8)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (default 128)")
    parser.add_argument("--task-share", type=float, default=0.5, help="of the rows: recall and copying (default 0.5)")
    parser.add_argument("--distances", default="16,32,64", help="of the recall task, tokens (default 16,32,64)")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default 50)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--intermediate-size", type=int, default=384)


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="folder of a Qwen2/Qwen2.5 checkpoint, or of `search base`")
    parser.add_argument("--window-size", type=int, default=32, help="tokens, the current one included (default 32)")
    parser.add_argument("--objective", choices=OBJECTIVES, default="loss", help="minus the loss of the right answer, or accuracy")
    parser.add_argument("--examples", type=int, default=64, help="of each task (default 64)")
    parser.add_argument("--questions", type=Path, action="append", default=[], help="JSON lines with query, choices, gold; another task")
    parser.add_argument("--recompute", action="store_true", help="keep only layer inputs for the backward pass; less memory")


def _add_placement(parser: argparse.ArgumentParser) -> None:
    _add_search(parser)
    parser.add_argument("--full", type=int, default=2, help="layers that keep full attention (default 2)")
    parser.add_argument("--window", type=int, default=0, help="layers that get sliding-window attention (default 0)")
    parser.add_argument("--full-task", default="recall", help="task that places full attention (default recall)")
    parser.add_argument("--window-task", default="language modelling", help="task that places windows")
    parser.add_argument("--width", type=int, default=4, help="of the beam (default 4)")
    parser.add_argument("--exhaustive-up-to", type=int, default=64, help="evaluate all placements if no more than this")
    parser.add_argument("--jet-heads", type=int, default=4)
    parser.add_argument("--jet-head-dim", type=int, default=32)
    parser.add_argument("--jet-expand-v", type=float, default=2.0)


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    _add_search(parser)
    parser.add_argument("--placement", required=True, help="folder of `search placement`, or the layers: 'jet attn jet ...'")
    parser.add_argument("--task", default="language modelling", help="whose objective is the quality")
    parser.add_argument("--speed-batch", type=int, default=4, help="sequences of the speed measurement (default 4)")
    parser.add_argument("--speed-prompt", type=int, default=64, help="tokens of its prompts (default 64)")
    parser.add_argument("--speed-tokens", type=int, default=32, help="generated tokens that are timed (default 32)")


def _add_blocks(parser: argparse.ArgumentParser) -> None:
    _add_comparison(parser)
    parser.add_argument("--shape", default="32x64x4", help="KxVxH of every block: an equal cache (default 32x64x4)")
    parser.add_argument("--only", action="append", choices=BLOCKS, help="compare only this block; may be repeated (default: all)")


def _add_design(parser: argparse.ArgumentParser) -> None:
    _add_comparison(parser)
    parser.add_argument("--shape", default="32x64x4", help="KxVxH of every variant (default 32x64x4)")
    parser.add_argument("--only", action="append", choices=DESIGNS, help="compare only this variant; may be repeated (default: all)")


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    _add_comparison(parser)
    parser.add_argument("--state", type=int, default=8192, help="elements of state per JetBlock: K*V*H (default 8192)")
    parser.add_argument("--heads", default="2,4", help="H to try (default 2,4)")
    parser.add_argument("--keys", default="16,32,64", help="K to try; V follows (default 16,32,64)")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--min-throughput", type=float, help="generated tokens per second that a shape must reach")
    limit.add_argument("--min-share", type=float, default=0.9, help="the same as a share of the fastest shape's (default 0.9)")


def _add_final(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, required=True, help="folder of the base, the teacher")
    parser.add_argument("--model", type=Path, required=True, help="folder of the hybrid that an earlier stage exported")
    parser.add_argument("--whole-steps", type=int, default=500, help="steps of the whole model, after --steps of distillation")
    parser.add_argument("--examples", type=int, default=64, help="of each task (default 64)")
    parser.set_defaults(questions=[])


def _integers(arguments: argparse.Namespace, name: str) -> tuple[int, ...]:
    """The option --name as integers, none negative."""
    got = getattr(arguments, name)
    try:
        found = tuple(int(part) for part in got.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 0:
        raise ValueError(f"--{name} must be integers separated by commas, got {got!r}")
    return found


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
    return corpus


def _recipe(arguments: argparse.Namespace, **changes) -> Recipe:
    return Recipe(arguments.steps, arguments.learning_rate, save_every=arguments.save_every, **changes)


def _tasks(arguments: argparse.Namespace, corpus: TextCorpus, tokenizer: Tokenizer, seed: int = 0) -> list[Task]:
    """Another seed gives other examples of the generated tasks."""
    count, length = arguments.examples, arguments.length
    recall = Recall(corpus.held_out, tokenizer.end_of_text_id, _integers(arguments, "distances"))
    tasks = [
        recall.task(count, length, seed),
        Copy(corpus.held_out).task(count, length, seed),
        language_modelling(corpus.held_out, count, length, seed),
    ]
    return tasks + [MultipleChoice.from_jsonl(path, tokenizer) for path in arguments.questions]


# Options that a training does not depend on: it is not repeated when they change.
NOT_TRAINING = {"run", "stage", "stage_run", "command", "model", "whole_steps", "output", "save_every", "text", "base"}
NOT_TRAINING |= {"full", "window", "window_size", "full_task", "window_task", "objective", "width", "exhaustive_up_to"}
NOT_TRAINING |= {"examples", "questions", "task", "placement", "state", "heads", "keys", "only", "min_throughput", "min_share"}
NOT_TRAINING |= {"speed_batch", "speed_prompt", "speed_tokens"}


def _facts(arguments: argparse.Namespace, corpus: TextCorpus, base: JetNemotronForCausalLM | None = None) -> list[tuple[str, object]]:
    """What a training depends on, for the report and to recognise checkpoints: options, digests of text and base."""
    facts = sorted((k, v) for k, v in vars(arguments).items() if k not in NOT_TRAINING)
    return [*facts, ("text", corpus.digest), *([("base", weights_digest(base))] if base is not None else [])]


def _task_facts(arguments: argparse.Namespace) -> list[tuple[str, object]]:
    """What the scores depend on beside the training."""
    questions = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in arguments.questions]
    return [("window_size", arguments.window_size), ("examples", arguments.examples), *questions]


def run_base(arguments: argparse.Namespace) -> None:
    tokenizer = Tokenizer.byte_level()
    corpus = _corpus(arguments, tokenizer)
    model = small_base(
        arguments.layers,
        arguments.seed,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
    ).to(arguments.device)
    losses = train_base(
        model,
        corpus,
        _recipe(arguments, weight_decay=0.1),
        batch_size=arguments.batch,
        length=arguments.length,
        task_share=arguments.task_share,
        distances=_integers(arguments, "distances"),
        mark=tokenizer.end_of_text_id,
        seed=arguments.seed,
        checkpoint=arguments.output / "base.ckpt",
    )
    if ranks()[0]:
        return
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    held_out = language_modelling(corpus.held_out, 64, arguments.length).score(
        lambda ids: model(ids.to(model.device)).logits
    )
    last = losses[-20:]
    lines = ["# Base model\n"]
    if losses:
        curve(arguments.output / "loss.png", losses, "base: text, recall and copying", "nats per token")
        lines.append(f"Loss of the last {len(last)} steps {sum(last) / len(last):.4f}; ")
    lines.append(f"held-out text {held_out.loss:.4f} nats per token.\n\n## Provenance\n\n{provenance(_facts(arguments, corpus))}")
    write_text(arguments.output / "report.md", "".join(lines))
    print(f"held-out text: {held_out.loss:.4f} nats per token; model and report: {arguments.output}/")


def load_base(folder: Path, device: str) -> tuple[JetNemotronForCausalLM, Tokenizer]:
    """Base and tokenizer of a folder. In fp32 whatever is stored: the paths beside it are trained in the base's dtype."""
    base = from_pretrained(folder, dtype=torch.float32, device=device, progress=partial(tqdm, desc="loading base", leave=False))
    if not (folder / TOKENIZER_FILE).is_file():
        raise FileNotFoundError(f"--base: {folder} has no {TOKENIZER_FILE}")
    tokenizer = Tokenizer.from_pretrained(folder)
    if tokenizer.end_of_text_id is None:
        raise ValueError(f"--base: the tokenizer in {folder} must have <|endoftext|>, which marks the recall task's keys")
    return base, tokenizer


def run_placement(arguments: argparse.Namespace) -> None:
    base, tokenizer = load_base(arguments.base, arguments.device)
    corpus = _corpus(arguments, tokenizer)
    jet = JetBlockConfig(num_heads=arguments.jet_heads, head_dim=arguments.jet_head_dim, expand_v=arguments.jet_expand_v)
    network = SuperNetwork(base, jet, arguments.window_size, arguments.seed, arguments.recompute)
    options = PlacementOptions(
        arguments.full,
        arguments.window,
        arguments.full_task,
        arguments.window_task,
        arguments.objective,
        arguments.width,
        arguments.exhaustive_up_to,
    )
    mark = tokenizer.end_of_text_id
    recall = Recall(corpus.training, mark, _integers(arguments, "distances"))
    sources = text_and_tasks(corpus, mark, arguments.task_share, recall)
    loader = Loader(sources, arguments.batch, arguments.length + 1, arguments.seed)
    facts, asked = _facts(arguments, corpus, base), _task_facts(arguments)
    output = arguments.output
    tasks = _tasks(arguments, corpus, tokenizer)
    losses = train_super_network(network, loader, _recipe(arguments), dict(facts), output / "super_network.ckpt")
    book = ScoreBook(network, tasks, dict(facts + asked), output / "scores.ckpt")
    result = search_placement(book, options, losses)
    if ranks()[0]:
        return
    unseen = _tasks(arguments, corpus, tokenizer, seed=1)
    fresh = ScoreBook(network, unseen, dict([*facts, *asked, ("examples seed", 1)]), output / "fresh_scores.ckpt")
    write_report(output, book, result, options, facts + asked, fresh)
    export(network, result.placement, output / "model", tokenizer)
    print(f"placement: {' '.join(result.placement)}")
    print(f"report: {output}/report.md; model: {output}/model (try: jetkernels generate --model {output}/model --prompt 'def ')")


def _placement(arguments: argparse.Namespace) -> tuple[str, ...]:
    """--placement: the layers themselves, or those in a folder's result.json."""
    path = Path(arguments.placement) / "result.json"
    if not path.is_file():
        return tuple(arguments.placement.split())
    try:
        return tuple(json.loads(path.read_text(encoding="utf-8"))["placement"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--placement: {path} must be a result of `search placement`") from None


@dataclass(frozen=True)
class Comparison:
    """What stages 2, 3 and 4 share: the measured candidates, and what the report says about them."""

    rows: list[Measured]
    meter: Meter
    tokenizer: Tokenizer
    facts: list[tuple[str, object]]


def _compare(
    arguments: argparse.Namespace, names: Sequence[str], block: Callable[[str], JetBlockConfig | Callable[[int], torch.nn.Module]]
) -> Comparison:
    """Trains and measures the candidates `names`; block: name -> what `SuperNetwork` takes as its linear paths."""
    base, tokenizer = load_base(arguments.base, arguments.device)
    corpus = _corpus(arguments, tokenizer)
    mark = tokenizer.end_of_text_id
    sources = text_and_tasks(corpus, mark, arguments.task_share, Recall(corpus.training, mark, _integers(arguments, "distances")))
    facts, placement = _facts(arguments, corpus, base), _placement(arguments)
    settings = ("task", "objective", "speed_batch", "speed_prompt", "speed_tokens")
    asked = _task_facts(arguments) + [(name, getattr(arguments, name)) for name in settings] + [("placement", " ".join(placement))]
    meter = Meter(
        lambda name: SuperNetwork(base, block(name), arguments.window_size, arguments.seed, arguments.recompute),
        placement,
        Loader(sources, arguments.batch, arguments.length + 1, arguments.seed),
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
    rows = measure_all(names, meter, dict(facts + asked), arguments.output / "candidates.ckpt")
    return Comparison(rows, meter, tokenizer, facts + asked)


def _quality(arguments: argparse.Namespace) -> str:
    return f"{arguments.task}, {'minus the loss' if arguments.objective == 'loss' else 'accuracy'}"


def _report_comparison(arguments: argparse.Namespace, found: Comparison, title: str, against: Sequence[str]) -> None:
    if ranks()[0] == 0:
        best = write_candidate_report(arguments.output, title, found.rows, against, _quality(arguments), found.facts)
        print(f"best: {best.name}; report: {arguments.output}/report.md")


def _shape(arguments: argparse.Namespace) -> Shape:
    try:
        return Shape.from_name(arguments.shape)
    except (ValueError, TypeError):
        raise ValueError(f"--shape must be KxVxH, such as 96x256x12, got {arguments.shape!r}") from None


def run_blocks(arguments: argparse.Namespace) -> None:
    shape = _shape(arguments)
    found = _compare(arguments, arguments.only or list(BLOCKS), lambda name: lambda size: BLOCKS[name](size, shape))
    _report_comparison(arguments, found, "Linear-attention blocks", ("JetBlock", "Mamba2"))


def run_design(arguments: argparse.Namespace) -> None:
    shape, names = _shape(arguments), arguments.only or list(DESIGNS)
    found = _compare(arguments, names, lambda name: lambda size: DesignedBlock(size, shape, DESIGNS[name]))
    _report_comparison(arguments, found, "Design of the JetBlock", names)


def run_shapes(arguments: argparse.Namespace) -> None:
    grid = equal_cache_grid(arguments.state, _integers(arguments, "heads"), _integers(arguments, "keys"))
    found = _compare(arguments, [shape.name for shape in grid], lambda name: Shape.from_name(name).config())
    if ranks()[0]:
        return
    fastest = max(row.generation_per_second for row in found.rows)
    minimum = arguments.min_share * fastest if arguments.min_throughput is None else arguments.min_throughput
    best = write_shape_report(arguments.output, found.rows, minimum, found.facts)
    network, _ = found.meter.train(best.name)
    export(network, found.meter.placement, arguments.output / "model", found.tokenizer)
    print(f"best: {best.name} (KxVxH); report: {arguments.output}/report.md; model: {arguments.output}/model")


def run_final(arguments: argparse.Namespace) -> None:
    base, tokenizer = load_base(arguments.base, arguments.device)
    student = JetNemotronForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, device=arguments.device)
    corpus = _corpus(arguments, tokenizer)
    mark = tokenizer.end_of_text_id
    sources = text_and_tasks(corpus, mark, arguments.task_share, Recall(corpus.training, mark, _integers(arguments, "distances")))
    loader = Loader(sources, arguments.batch, arguments.length + 1, arguments.seed)
    tasks, facts = _tasks(arguments, corpus, tokenizer), _facts(arguments, corpus, base)

    def scores(model: JetNemotronForCausalLM) -> list[float]:
        found = [task.score(lambda ids: model(ids.to(model.device)).logits) for task in tasks]
        return [value for score in found for value in (score.loss, score.accuracy)]

    rows = [["base", *scores(base)], ["hybrid before", *scores(student)]]
    recipe = _recipe(arguments)
    whole = replace(recipe, steps=arguments.whole_steps)
    parts = train_final(student, base, loader, recipe, whole, dict(facts), arguments.output)
    if ranks()[0]:
        return
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


def run_all(arguments: argparse.Namespace) -> None:
    """Each stage as its own command would run it, with the defaults of that command where `all` has no option."""
    output, shape = arguments.output, _shape(arguments)
    common = ["steps", "learning_rate", "batch", "length", "task_share", "distances", "save_every", "device", "seed", "suffix"]
    words = [word for name in common for word in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))]
    if arguments.text is not None:
        words += ["--text", str(arguments.text)]
    base = arguments.base or output / "base"
    examples = ["--examples", str(arguments.examples)]
    placed = ["--base", str(base), "--placement", str(output / "placement"), *examples]
    size = ["--shape", arguments.shape]
    jet = ["--jet-heads", str(shape.H), "--jet-head-dim", str(shape.K), "--jet-expand-v", repr(shape.config().expand_v)]
    budget = ["--full", str(arguments.full), "--window", str(arguments.window)]
    keys = sorted({max(1, shape.K // 2), shape.K, 2 * shape.K})
    grid = ["--state", str(shape.state), "--heads", f"{shape.H},{2 * shape.H}", "--keys", ",".join(map(str, keys))]
    plan = {
        "base": ["--layers", str(arguments.layers)],
        "placement": ["--base", str(base), *examples, *budget, *jet],
        "blocks": [*placed, *size],
        "design": [*placed, *size],
        "shapes": [*placed, *grid],
        "final": ["--base", str(base), "--model", str(output / "shapes" / "model"), *examples, "--whole-steps", str(arguments.steps)],
    }
    parser = argparse.ArgumentParser(prog="jetkernels search")
    add_arguments(parser)
    for name, options in plan.items():
        if name == "base" and arguments.base is not None:
            continue
        if ranks()[0] == 0:
            print(f"== {name}")
        stage = parser.parse_args([name, "--output", str(output / name), *words, *options])
        stage.stage_run(stage)
        wait_for_ranks()


def run(arguments: argparse.Namespace) -> None:
    for name in ("steps", "batch", "length"):
        if getattr(arguments, name) < (name != "steps"):
            raise ValueError(f"--{name} must be at least {int(name != 'steps')}, got {getattr(arguments, name)}")
    join_ranks(torch.device(arguments.device))
    arguments.stage_run(arguments)
