"""Measure prefill and decode tokens per second and the size of the cache. The warm-up is not counted."""

import argparse
import json

from jetkernels._progress import progress
from jetkernels.cli.models import add_model_arguments, check_memory, load_model, read_config
from jetkernels.cli.options import integer
from jetkernels.model.speed import WARM_UP_STEPS, measure_speed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jetkernels throughput`."""
    add_model_arguments(parser)
    parser.add_argument("--batch", type=integer(1, 2**16), default=1, help="sequences (default 1)")
    parser.add_argument(
        "--prompt-length", type=integer(1, 2**28), default=512, help="tokens of each prompt (default 512)"
    )
    parser.add_argument(
        "--new-tokens", type=integer(1, 2**28), default=32, help="decode steps that are timed (default 32)"
    )
    parser.add_argument("--prefill-chunk", type=integer(1), help="prompt tokens per forward")
    parser.add_argument("--repeats", type=integer(1), default=3, help="timed runs; the median counts (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints the result."""
    config = read_config(arguments)
    B, T, new = arguments.batch, arguments.prompt_length, arguments.new_tokens
    check_memory(arguments, config, B, T + new)
    model = load_model(arguments, config)
    total = 1 + min(new, WARM_UP_STEPS) + arguments.repeats * (1 + new)
    with progress(total=total, desc="timing", disable=arguments.json) as bar:
        speed = measure_speed(
            model,
            B,
            T,
            new,
            arguments.repeats,
            prefill_chunk=arguments.prefill_chunk,
            seed=arguments.seed,
            on_call=bar.update,
        )
    result = {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch": B,
        "prompt_length": T,
        "new_tokens": new,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prefill_tokens_per_second": speed.prefill_tokens_per_second,
        "decode_tokens_per_second": speed.decode_tokens_per_second,
        "decode_step_ms": 1e3 * speed.decode_seconds / new,
        "cache_mib": speed.cache_bytes / 2**20,
        "runs": speed.runs,
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result.items():
        print(
            f"{name.replace('_', ' '):28} {value:,.1f}"
            if isinstance(value, float)
            else f"{name.replace('_', ' '):28} {value}"
        )
