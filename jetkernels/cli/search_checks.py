"""What of a search can be found wrong before text is read, a base is loaded or a file is written."""

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import torch

from jetkernels._optional import optional
from jetkernels.model import JetNemotronConfig, Tokenizer
from jetkernels.modules import JetBlock, JetBlockConfig
from jetkernels.postnas import Copy, MultipleChoice, Recall, ranks
from jetkernels.postnas.base import PACKAGES, pretrained_path, read_config, small_config
from jetkernels.postnas.checkpoints import DifferentRun
from jetkernels.postnas.comparisons import ComparisonOptions, ShapesStage, placement_of
from jetkernels.postnas.completions import read_prompts
from jetkernels.postnas.design import DESIGNS
from jetkernels.postnas.hybrid import is_hybrid, read_path
from jetkernels.postnas.linear_path import JET, LinearPath
from jetkernels.postnas.options import Integers, OutcomeOptions, ShapeOptions, SizeOptions, StageOptions, TaskOptions
from jetkernels.postnas.pipeline import CARRIED, Pipeline
from jetkernels.postnas.report.placement import read_budgets
from jetkernels.postnas.shapes import Shape
from jetkernels.postnas.stages import BaseStage, FinalStage, PlacementStage, base_tokenizer

from . import memory
from .options import UsageError, integers, integers_of

FP32 = 4
TASKS = ("recall", "copy", "language modelling")


def shape(text: str) -> Shape:
    """A shape, KxVxH: three positive integers."""
    try:
        found = Shape.from_name(text)
        if all(0 < size < 2**16 for size in found):
            return found
    except (ValueError, TypeError):
        pass
    raise argparse.ArgumentTypeError(f"must be KxVxH, such as 96x256x12, got {text[:60]!r}")


def several(least: int, most: int) -> Callable[[str], Integers]:
    """Integers from least to most, separated by commas, none twice."""
    parse = integers(least, most)

    def different(text: str) -> Integers:
        found = Integers(integers_of(parse(text)))
        if len({*found}) < len(found):
            raise argparse.ArgumentTypeError(f"must be different integers, got {text[:60]}")
        return found

    return different


def check(stage: StageOptions) -> None:
    """Refuses options that cannot lead to the end of a stage; reads configs, tokenizer and questions, but no weights.

    Raises:
        UsageError: they do not fit each other.
        ValueError, OSError, RuntimeError, ModuleNotFoundError: what they name is wrong or missing, or this machine is
            too small.
    """
    for package in ("matplotlib", "safetensors", "tokenizers"):  # some are needed at the end only, hours later
        optional(package, "all", "jetkernels search")
    if isinstance(stage, TaskOptions) and stage.harness:
        optional("lm_eval", "harness", "--harness")
    needed = {
        f"--distances {stage.distances}": Recall(torch.empty(0), 0, stage.distances).shortest - 1,
        "copying": 2 * Copy.size + Copy.gap - 1,
    }
    for what, least in needed.items():
        if stage.length < least:
            raise UsageError(f"--length must be at least {least} for {what}, got {stage.length}")
    if stage.batch % ranks()[1]:
        raise UsageError(f"--batch must be a multiple of the {ranks()[1]} ranks, got {stage.batch}")
    if stage.text is not None and not stage.text.is_dir():
        raise NotADirectoryError(f"--text: {stage.text} is not a folder")
    names = _task_names(stage)
    config = _base_config(stage)
    for option in ("full_task", "window_task", "task"):
        if (got := getattr(stage, option, names[0])) not in names:
            raise UsageError(f"--{option.replace('_', '-')} must be one of {', '.join(names)}, got {got!r}")
    _check_layers(stage, config.num_hidden_layers)
    if getattr(stage, "start", "random") == "warm" and (got := getattr(stage, "linear_path", JET)) != JET:
        raise UsageError(f"--start warm needs --linear-path {JET}, got {got}")
    if isinstance(stage, ShapeOptions):
        beside = LinearPath(stage.shape, getattr(stage, "linear_path", JET)).paths()
        with torch.device("meta"):
            JetBlock(config.hidden_size, stage.shape.config())
            if not isinstance(beside, JetBlockConfig):
                beside(config.hidden_size)
    if isinstance(stage, ShapesStage):
        for one in stage.grid():
            path = LinearPath(one, stage.block, stage.design)
            if stage.start == "warm" and path.config() is None:
                raise UsageError(f"--start warm needs a JetBlock that a model can be exported with, got {path}")
    if isinstance(stage, Pipeline) and stage.block in (*CARRIED, JET):
        least, got = max(design.reduction for design in DESIGNS.values()), stage.shape.H * stage.shape.V
        if got < least:
            raise UsageError(f"--shape must have H*V of at least {least} for the designs of stage 3, got {got}")
    if isinstance(stage, Pipeline) and stage.design not in (*CARRIED, JET) and stage.block != JET:
        raise UsageError(f"--design {stage.design!r} needs --block {JET}, got {stage.block}")


def _check_layers(stage: StageOptions, layers: int) -> None:
    """What a stage says about the layers of its base, against their number."""
    if isinstance(stage, PlacementStage | Pipeline):
        if stage.full > layers:
            raise UsageError(f"--full must be between 0 and the {layers} layers of the base, got {stage.full}")
        if max(stage.budgets, default=0) > layers:
            raise UsageError(f"--budgets must be between 1 and the {layers} layers of the base, got {stage.budgets}")
        if stage.window > (left := layers - stage.full):
            raise UsageError(f"--window must be between 0 and the {left} layers that --full leaves, got {stage.window}")
    if isinstance(stage, ComparisonOptions):
        placement = placement_of(stage.placement)
        if len(placement) != layers or "jet" not in placement:
            raise ValueError(
                f"--placement must name {layers} layers, jet among them, for this base, got {' '.join(placement)}"
            )


def _base_config(stage: StageOptions) -> JetNemotronConfig:
    """Of the base that is loaded or made."""
    folder = getattr(stage, "base", None)
    if isinstance(stage, BaseStage | Pipeline) and stage.pretrained is not None:
        _check_pretrained(stage, stage.pretrained)
        folder = pretrained_path(stage.pretrained)
    if folder is not None:
        config = read_config(folder)
        base_tokenizer(folder)
        copies = 1
    else:
        assert isinstance(stage, SizeOptions)
        sizes = {"hidden_size": stage.hidden_size, "intermediate_size": stage.intermediate_size}
        config = small_config(stage.layers, **sizes)
        copies = memory.TRAINING_COPIES
    logits = stage.batch * stage.length * config.vocab_size
    hidden = stage.batch * stage.length * config.hidden_size * config.num_hidden_layers
    needed = FP32 * (copies * memory.parameter_count(config) + logits + hidden)
    memory.require(f"the base and {stage.batch} rows of {stage.length:,} tokens", needed, stage.device)
    if isinstance(stage, OutcomeOptions):
        held = memory.cache_bytes(config, torch.float32, 1, stage.context)
        memory.require(f"the cache of --context {stage.context:,}", held, stage.device)
        if stage.prompts is not None:
            read_prompts(stage.prompts)
    if isinstance(stage, FinalStage) and stage.placement_folder is not None:
        read_budgets(stage.placement_folder)
    if isinstance(stage, FinalStage) and is_hybrid(stage.model):
        read_path(stage.model)
    elif isinstance(stage, FinalStage):
        student = JetNemotronConfig.from_file(stage.model)
        if student.vocab_size != config.vocab_size:
            raise ValueError(
                f"--model and --base must have one vocabulary, got {student.vocab_size} and {config.vocab_size} tokens"
            )
    return config


def _check_pretrained(stage: BaseStage | Pipeline, pretrained: str) -> None:
    """Refuses what means nothing beside --pretrained, and to write over it."""
    others = [name for name in stage.FOR_TRAINING if getattr(stage, name) != getattr(type(stage), name)]
    if getattr(stage, "base", None) is not None:
        others.append("base")
    if others:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise UsageError(f"--pretrained takes a model as it is and leaves nothing to {options}: give one or the other")
    written = stage.output / "base" if isinstance(stage, Pipeline) else stage.output
    if pretrained not in PACKAGES and written.resolve() == Path(pretrained).resolve():
        raise UsageError(f"--output must leave --pretrained as it is, {written} is the same folder")


def _task_names(stage: StageOptions) -> list[str]:
    """Of all tasks that the options name; none twice."""
    names = list(TASKS)
    if isinstance(stage, TaskOptions):
        names += ["continuations"] if stage.continuations else []
        names += [MultipleChoice.from_jsonl(path, Tokenizer.byte_level()).name for path in stage.questions]
        names += [word.partition(":")[0] for word in stage.harness]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(
            f"--questions and --harness must name different tasks, got {twice[0]!r} twice or as one of "
            f"{', '.join(TASKS)}"
        )
    return names


def explained(error: DifferentRun, stage: StageOptions) -> str:
    """What differs from the run that left a checkpoint, in the words of the command line."""
    given = {"num_hidden_layers": "layers"}
    named = {"text": "the text (--text, --suffix) is another one", "base": "the base (--base) has other weights"}
    known = {field.name for field in fields(stage)}
    options, others = [], []
    for name, old, new in error.differences:
        name = given.get(name, name)
        if name in named:
            options.append(named[name])
        elif name in known:
            options.append(f"--{name.replace('_', '-')} was {_shown(old)}, now it is {_shown(new)}")
        else:
            others.append(f"{name} was {_shown(old)}, now it is {_shown(new)}")
    return (
        f"resume: {error.path} belongs to a run with other options: {'; '.join(options or others)}; "
        "give those again, or another --output"
    )


def _shown(value: object, limit: int = 80) -> str:
    if isinstance(value, list):
        value = ",".join(map(str, value))
    text = "not given" if value is None else str(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


Stage = TypeVar("Stage", bound=StageOptions)


def told(kind: type[Stage], arguments: argparse.Namespace) -> Stage:
    """The stage of this kind, told what was typed."""
    return kind(**{field.name: getattr(arguments, field.name) for field in fields(kind)})
