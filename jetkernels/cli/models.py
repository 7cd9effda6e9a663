"""The options that name a model, shared by the subcommands that run one."""

import argparse
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="folder with config.json, safetensors weights and tokenizer.json")
    which.add_argument("--config", help="2b, 4b, or the path of a config.json; needs --random-weights")
    parser.add_argument("--random-weights", action="store_true", help="draw the weights of --config instead of loading any")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the weights (default: what the config says)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and of sampling")


def load_model(arguments: argparse.Namespace) -> JetNemotronForCausalLM:
    """The model that the options name, in evaluation mode."""
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    if arguments.model is not None:
        if arguments.random_weights:
            raise ValueError("--random-weights goes with --config, not with --model")
        loading = partial(tqdm, desc="loading weights", leave=False)
        return JetNemotronForCausalLM.from_pretrained(
            arguments.model, dtype=dtype, device=arguments.device, progress=loading
        ).eval()
    if not arguments.random_weights:
        raise ValueError("--config names a shape without weights: add --random-weights, or give --model FOLDER")
    path = Path(arguments.config)
    config = JetNemotronConfig.from_file(path) if path.exists() else JetNemotronConfig.from_name(arguments.config)
    drawing = partial(tqdm, desc="drawing weights", leave=False)
    return JetNemotronForCausalLM.random(
        config, dtype=dtype, device=arguments.device, seed=arguments.seed, progress=drawing
    ).eval()
