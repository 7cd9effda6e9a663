"""The options that name a model, shared by the subcommands that run one."""

import argparse
from functools import partial
from pathlib import Path

import torch

from jetkernels._progress import progress
from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM
from jetkernels.model.checkpoint import read_folder_config

from . import memory
from .options import UsageError, default_device, device, seed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model or --config, and how it is loaded."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="folder with config.json, safetensors weights and tokenizer.json")
    which.add_argument("--config", help="2b, 4b, or the path of a config.json; needs --random-weights")
    parser.add_argument(
        "--random-weights", action="store_true", help="draw the weights of --config instead of loading any"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: what the config says)")
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
    path = Path(arguments.config)
    return JetNemotronConfig.from_file(path) if path.exists() else JetNemotronConfig.from_name(arguments.config)


def dtype_of(arguments: argparse.Namespace, config: JetNemotronConfig) -> torch.dtype:
    """--dtype, or what the config says."""
    return DTYPES[arguments.dtype] if arguments.dtype else config.dtype


def check_memory(arguments: argparse.Namespace, config: JetNemotronConfig, batch: int, tokens: int) -> None:
    """Refuses a model that cannot fit, with a cache of `batch` sequences of `tokens` tokens."""
    dtype = dtype_of(arguments, config)
    needed = memory.parameter_count(config) * dtype.itemsize + memory.cache_bytes(config, dtype, batch, tokens)
    memory.require(f"weights and a cache of {batch} x {tokens:,} tokens", needed, arguments.device)


def load_model(arguments: argparse.Namespace, config: JetNemotronConfig) -> JetNemotronForCausalLM:
    """The model that the options name, in evaluation mode."""
    dtype = dtype_of(arguments, config)
    if arguments.model is not None:
        loading = partial(progress, desc="loading weights")
        return JetNemotronForCausalLM.from_pretrained(
            arguments.model, dtype=dtype, device=arguments.device, progress=loading
        ).eval()
    drawing = partial(progress, desc="drawing weights")
    return JetNemotronForCausalLM.random(
        config, dtype=dtype, device=arguments.device, seed=arguments.seed, progress=drawing
    ).eval()
