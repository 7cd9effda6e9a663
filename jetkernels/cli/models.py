"""The options that name a model, shared by the subcommands that run one."""

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from jetkernels import _machine
from jetkernels._progress import progress
from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM, Tokenizer
from jetkernels.model.checkpoint import read_folder_config
from jetkernels.model.text_loss import text_loss
from jetkernels.reading import utf8_text

from . import memory
from .options import UsageError, default_device, device, seed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BITS = {"int8": 8, "int4": 4}
# Of the text by which quantisation is judged: fewer say nothing, more take long.
LEAST_TEXT, MOST_TEXT = 64, 1024


@dataclass(frozen=True)
class Text:
    """What --quantize is judged by.

    Attributes:
        ids: tokens.
        source: where they come from, for people.
    """

    ids: list[int]
    source: str


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model or --config, and how it is loaded."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="folder with config.json, safetensors weights and tokenizer.json")
    which.add_argument("--config", help="2b, 4b, full-attention, or the path of a config.json; needs --random-weights")
    parser.add_argument(
        "--random-weights", action="store_true", help="draw the weights of --config instead of loading any"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: what the config says)")
    parser.add_argument(
        "--quantize",
        choices=BITS,
        help="keep the weights of the linear layers in 8 or 4 bits; prints the loss it costs",
    )
    parser.add_argument(
        "--loss-text",
        type=Path,
        help=f"UTF-8 text on which the loss with and without --quantize is measured, {MOST_TEXT:,} tokens at most",
    )
    parser.add_argument(
        "--device", type=device, default=default_device(), help="cpu, cuda or cuda:N (default %(default)s)"
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the random weights and of sampling (default 0)")


def read_config(arguments: argparse.Namespace) -> JetNemotronConfig:
    """The config of the model that the options name. Reads no weights, but sees that there are some."""
    if arguments.model is not None:
        if arguments.random_weights:
            raise UsageError("--random-weights goes with --config, not with --model")
        return read_folder_config(arguments.model, JetNemotronConfig.from_dict)
    if not arguments.random_weights:
        raise UsageError("--config names a shape without weights: add --random-weights, or give --model FOLDER")
    return named_config(arguments.config)


def named_config(name: str) -> JetNemotronConfig:
    """The config of a path, or one of those that ship with the package."""
    path = Path(name)
    return JetNemotronConfig.from_file(path) if path.exists() else JetNemotronConfig.from_name(name)


def dtype_of(arguments: argparse.Namespace, config: JetNemotronConfig) -> torch.dtype:
    """--dtype, or what the config says."""
    return DTYPES[arguments.dtype] if arguments.dtype else config.dtype


def bits_of(arguments: argparse.Namespace) -> int | None:
    """--quantize as a number."""
    return BITS[arguments.quantize] if arguments.quantize else None


def check_memory(arguments: argparse.Namespace, config: JetNemotronConfig, batch: int, tokens: int) -> None:
    """Refuses a model that cannot fit, with a cache of `batch` sequences of `tokens` tokens."""
    dtype = dtype_of(arguments, config)
    weights = memory.weight_bytes(config, dtype, bits_of(arguments))
    needed = weights + memory.cache_bytes(config, dtype, batch, tokens)
    memory.require(f"weights and a cache of {batch} x {tokens:,} tokens", needed, arguments.device)


def load_model(
    arguments: argparse.Namespace, config: JetNemotronConfig, prompt: list[int] | None = None
) -> JetNemotronForCausalLM:
    """The model that the options name, in evaluation mode.

    With --quantize it says on standard error what that saves, and what it costs in loss: on --loss-text, or on the
    tokens of a prompt if they are enough. Where the weights do not fit unquantised, they never are.
    """
    text = read_text(arguments, config, prompt)
    if arguments.quantize is None:
        return _load(arguments, config, None)
    bits, dtype = BITS[arguments.quantize], dtype_of(arguments, config)
    whole, small = (memory.weight_bytes(config, dtype, b) for b in (None, bits))
    saves = f"{arguments.quantize}: {small / 2**20:,.1f} MiB of weights instead of {whole / 2**20:,.1f}"
    if text is None:
        model = _load(arguments, config, bits)
        random = "random weights predict nothing that it could spoil"
        short = f"to see what it costs in loss give --loss-text, a text of at least {LEAST_TEXT} tokens"
        _say(f"{saves}; {short if arguments.model is not None else random}")
        _machine.give_back_freed_memory()  # of the weights that it had
        return model
    ids = torch.tensor(text.ids[: min(MOST_TEXT, config.max_position_embeddings)])
    room = memory.available_bytes(arguments.device)
    before = ""
    if room is None or whole + memory.cache_bytes(config, dtype, 1, len(ids)) < room:
        model = _load(arguments, config, None)
        before = f"{text_loss(model, ids):.4f} -> "
        model.quantize_(bits)
    else:
        model = _load(arguments, config, bits)
    _say(
        f"{saves}; loss {before}{text_loss(model, ids):.4f} nats per token "
        f"({len(ids) - 1:,} tokens of {text.source}{'' if before else '; unquantised the weights do not fit'})"
    )
    _machine.give_back_freed_memory()
    return model


def read_text(arguments: argparse.Namespace, config: JetNemotronConfig, prompt: list[int] | None) -> Text | None:
    """The text by which --quantize is judged: --loss-text, or the prompt if it is long enough, or none."""
    if arguments.loss_text is None:
        enough = arguments.quantize and arguments.model is not None and prompt and len(prompt) >= LEAST_TEXT
        return Text(prompt, "the prompt") if enough and prompt else None
    if arguments.quantize is None:
        raise UsageError("--loss-text goes with --quantize")
    if arguments.model is None:
        raise UsageError("--loss-text goes with --model: random weights predict nothing")
    source = f"--loss-text {arguments.loss_text}"
    text = utf8_text(arguments.loss_text.read_bytes(), source)
    # Tokens of more characters are rare: a longer text is not read to its end.
    ids = Tokenizer.from_pretrained(arguments.model).encode(text[: 64 * MOST_TEXT])
    if len(ids) < LEAST_TEXT:
        raise ValueError(f"{source} must have at least {LEAST_TEXT} tokens, got {len(ids)}")
    if max(ids) >= config.vocab_size:
        raise ValueError(f"{source}: token ids must be below the vocabulary size {config.vocab_size}, got {max(ids)}")
    return Text(ids, source)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _load(arguments: argparse.Namespace, config: JetNemotronConfig, bits: int | None) -> JetNemotronForCausalLM:
    dtype = dtype_of(arguments, config)
    if arguments.model is not None:
        loading = partial(progress, desc="loading weights")
        return JetNemotronForCausalLM.from_pretrained(
            arguments.model, dtype=dtype, device=arguments.device, quantize=bits, progress=loading
        ).eval()
    return random_model(arguments, config, dtype, bits)


def random_model(
    arguments: argparse.Namespace, config: JetNemotronConfig, dtype: torch.dtype, bits: int | None = None
) -> JetNemotronForCausalLM:
    """A model of a config on the device that the options name, with weights of their seed, in evaluation mode.

    Its linear layers are quantised to `bits`, if there are any.
    """
    drawing = partial(progress, desc="drawing weights")
    return JetNemotronForCausalLM.random(
        config, dtype=dtype, device=arguments.device, seed=arguments.seed, quantize=bits, progress=drawing
    ).eval()
