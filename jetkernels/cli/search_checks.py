"""What of a search can be found wrong before text is read, a base is loaded or a file is written."""

import argparse
import json
from pathlib import Path

import torch

from jetkernels._optional import optional
from jetkernels.model import JetNemotronConfig, Tokenizer
from jetkernels.model.tokenizer import TOKENIZER_FILE
from jetkernels.modules import JetBlock
from jetkernels.postnas import Copy, MultipleChoice, Recall, ranks
from jetkernels.postnas.base import read_config, small_config
from jetkernels.postnas.checkpoints import DifferentRun
from jetkernels.postnas.shapes import Shape, equal_cache_grid

from . import memory
from .options import UsageError, integers_of

FP32 = 4
TASKS = ("recall", "copy", "language modelling")
LAYERS = ("jet", "attn", "swa")


def shape_of(text: str) -> Shape:
    """--shape, as three positive integers."""
    try:
        shape = Shape.from_name(text)
    except (ValueError, TypeError):
        shape = None
    if shape is None or not all(0 < size < 2**16 for size in shape):
        raise argparse.ArgumentTypeError(f"must be KxVxH, such as 96x256x12, got {text[:60]!r}")
    return shape


def shape(text: str) -> str:
    """A shape, as typed."""
    shape_of(text)
    return text


def integers_option(arguments: argparse.Namespace, name: str) -> tuple[int, ...]:
    return integers_of(getattr(arguments, name))


def placement_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """--placement: the layers themselves, or those in a folder's result.json."""
    path = Path(arguments.placement) / "result.json"
    if not path.is_file():
        found = tuple(arguments.placement.split())
        if not found or set(found) - set(LAYERS):
            raise ValueError(
                f"--placement must be {', '.join(LAYERS)} for each layer, or a folder of `search placement`, got {arguments.placement[:200]!r}"
            )
        return found
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["placement"]
    except (ValueError, KeyError, TypeError):
        found = None
    if not isinstance(found, list) or not found or not all(kind in LAYERS for kind in found):
        raise ValueError(f"--placement: {path} must be a result of `search placement`")
    return tuple(found)


def check(arguments: argparse.Namespace) -> None:
    """Raises where the options of a stage cannot lead to its end. Reads configs, tokenizer and questions, but no
    weights.
    """
    for package in ("matplotlib", "safetensors", "tokenizers"):  # some are needed at the end only, hours later
        optional(package, "all", "jetkernels search")
    if getattr(arguments, "harness", None):
        optional("lm_eval", "harness", "--harness")
    distances = integers_option(arguments, "distances")
    needed = {
        f"--distances {arguments.distances}": Recall(torch.empty(0), 0, distances).shortest - 1,
        "copying": 2 * Copy.size + Copy.gap - 1,
    }
    for what, least in needed.items():
        if arguments.length < least:
            raise UsageError(f"--length must be at least {least} for {what}, got {arguments.length}")
    if arguments.batch % ranks()[1]:
        raise UsageError(f"--batch must be a multiple of the {ranks()[1]} ranks, got {arguments.batch}")
    if arguments.text is not None and not arguments.text.is_dir():
        raise NotADirectoryError(f"--text: {arguments.text} is not a folder")
    names = _task_names(arguments)
    config = _base_config(arguments)
    layers = config.num_hidden_layers
    for option in ("full_task", "window_task", "task"):
        if (got := getattr(arguments, option, names[0])) not in names:
            raise UsageError(f"--{option.replace('_', '-')} must be one of {', '.join(names)}, got {got!r}")
    if hasattr(arguments, "full") and arguments.full > layers:
        raise UsageError(f"--full must be between 0 and the {layers} layers of the base, got {arguments.full}")
    if hasattr(arguments, "window") and arguments.window > layers - arguments.full:
        raise UsageError(
            f"--window must be between 0 and the {layers - arguments.full} layers that --full leaves, got {arguments.window}"
        )
    if hasattr(arguments, "placement"):
        placement = placement_of(arguments)
        if len(placement) != layers or "jet" not in placement:
            raise ValueError(
                f"--placement must name {layers} layers, jet among them, for this base, got {' '.join(placement)}"
            )
    if hasattr(arguments, "shape"):
        with torch.device("meta"):
            JetBlock(config.hidden_size, shape_of(arguments.shape).config())
    if hasattr(arguments, "state"):
        equal_cache_grid(arguments.state, integers_option(arguments, "heads"), integers_option(arguments, "keys"))


def _base_config(arguments: argparse.Namespace) -> JetNemotronConfig:
    """Of the base that is loaded or made."""
    if getattr(arguments, "base", None) is None:
        sizes = {"hidden_size": arguments.hidden_size, "intermediate_size": arguments.intermediate_size}
        config = small_config(arguments.layers, **sizes)
        copies = memory.TRAINING_COPIES
    else:
        config = read_config(arguments.base)
        base_tokenizer(arguments.base)
        copies = 1
    logits = arguments.batch * arguments.length * config.vocab_size
    hidden = arguments.batch * arguments.length * config.hidden_size * config.num_hidden_layers
    needed = FP32 * (copies * memory.parameter_count(config) + logits + hidden)
    memory.require(f"the base and {arguments.batch} rows of {arguments.length:,} tokens", needed, arguments.device)
    if getattr(arguments, "model", None) is not None:
        student = JetNemotronConfig.from_file(arguments.model)
        if student.vocab_size != config.vocab_size:
            raise ValueError(
                f"--model and --base must have one vocabulary, got {student.vocab_size} and {config.vocab_size} tokens"
            )
    return config


def base_tokenizer(folder: Path) -> Tokenizer:
    """Of a base: it has the token that marks the recall task's keys."""
    if not (folder / TOKENIZER_FILE).is_file():
        raise FileNotFoundError(f"--base: {folder} has no {TOKENIZER_FILE}")
    tokenizer = Tokenizer.from_pretrained(folder)
    if tokenizer.end_of_text_id is None:
        raise ValueError(
            f"--base: the tokenizer in {folder} must have <|endoftext|>, which marks the recall task's keys"
        )
    return tokenizer


def _task_names(arguments: argparse.Namespace) -> list[str]:
    """Of all tasks that the options name; none twice."""
    names = list(TASKS)
    for path in getattr(arguments, "questions", []):
        names.append(MultipleChoice.from_jsonl(path, Tokenizer.byte_level()).name)
    names += [word.partition(":")[0] for word in getattr(arguments, "harness", [])]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(
            f"--questions and --harness must name different tasks, got {twice[0]!r} twice or as one of {', '.join(TASKS)}"
        )
    return names


def explained(error: DifferentRun, arguments: argparse.Namespace) -> str:
    """What differs from the run that left a checkpoint, in the words of the command line."""
    given = {"num_hidden_layers": "layers"}
    named = {"text": "the text (--text, --suffix) is another one", "base": "the base (--base) has other weights"}
    options, others = [], []
    for name, old, new in error.differences:
        name = given.get(name, name)
        if name in named:
            options.append(named[name])
        elif hasattr(arguments, name):
            options.append(f"--{name.replace('_', '-')} was {_shown(old)}, now it is {_shown(new)}")
        else:
            others.append(f"{name} was {_shown(old)}, now it is {_shown(new)}")
    return f"resume: {error.path} belongs to a run with other options: {'; '.join(options or others)}; give those again, or another --output"


def _shown(value: object, limit: int = 80) -> str:
    if isinstance(value, list):
        value = ",".join(map(str, value))
    text = "not given" if value is None else str(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
