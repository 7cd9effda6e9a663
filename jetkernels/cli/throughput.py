"""Measure prefill and decode tokens per second and the size of the cache. The warm-up is not counted."""

import argparse
import json
import statistics
import time

import torch
from tqdm import tqdm

from jetkernels.cli.models import add_model_arguments, load_model
from jetkernels.model.generation import prefill


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
    parser.add_argument("--prompt-length", type=int, default=512, help="tokens of each prompt (default 512)")
    parser.add_argument("--new-tokens", type=int, default=32, help="decode steps that are timed (default 32)")
    parser.add_argument("--prefill-chunk", type=int, help="prompt tokens per forward")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the median counts (default 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure(model, ids: torch.Tensor, cache, new_tokens: int, chunk: int | None, bar: tqdm) -> tuple[float, float]:
    """Seconds of one prefill and of ``new_tokens`` decode steps after it."""
    cache.reset()
    synchronize(model.device)
    start = time.perf_counter()
    logits = prefill(model, ids, None, cache, chunk)
    synchronize(model.device)
    middle = time.perf_counter()
    bar.update()
    for _ in range(new_tokens):
        logits = model(logits[:, -1].argmax(-1, keepdim=True), cache=cache).logits
        bar.update()
    synchronize(model.device)
    return middle - start, time.perf_counter() - middle


def run(arguments: argparse.Namespace) -> None:
    for name in ("batch", "prompt_length", "new_tokens", "repeats"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    model = load_model(arguments)
    B, T, new = arguments.batch, arguments.prompt_length, arguments.new_tokens
    generator = torch.Generator().manual_seed(arguments.seed)
    ids = torch.randint(model.config.vocab_size, (B, T), generator=generator).to(model.device)
    cache = model.new_cache(B, T + new)
    warm_up = min(new, 4)
    times = []
    with tqdm(total=1 + warm_up + arguments.repeats * (1 + new), desc="warm-up", leave=False, disable=arguments.json) as bar:
        measure(model, ids, cache, warm_up, arguments.prefill_chunk, bar)
        bar.set_description("timing")
        for _ in range(arguments.repeats):
            times.append(measure(model, ids, cache, new, arguments.prefill_chunk, bar))
    prefill_seconds, decode_seconds = (statistics.median(column) for column in zip(*times))
    result = {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch": B,
        "prompt_length": T,
        "new_tokens": new,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prefill_tokens_per_second": B * T / prefill_seconds,
        "decode_tokens_per_second": B * new / decode_seconds,
        "decode_step_ms": 1e3 * decode_seconds / new,
        "cache_mib": cache.nbytes / 2**20,
        "runs": len(times),
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result.items():
        print(f"{name.replace('_', ' '):28} {value:,.1f}" if isinstance(value, float) else f"{name.replace('_', ' '):28} {value}")
