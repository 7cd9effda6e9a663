"""Measure prefill and decode tokens per second and the size of the cache. The warm-up is not counted.

With --against, decode steps of this model and of others in one run, behind contexts of several lengths and with the
most sequences that fit into the memory: the caches are preset, so that nothing has to be read first. Random values take
the time of any others. An interrupted run keeps what it has.
"""

import argparse
import datetime
import json
import platform
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jetkernels import _library, _machine
from jetkernels._progress import progress
from jetkernels._version import __version__
from jetkernels.cli import against, memory
from jetkernels.cli.against import Contender, Plan, Row
from jetkernels.cli.models import (
    add_model_arguments,
    check_memory,
    dtype_of,
    load_model,
    named_config,
    random_model,
    read_config,
)
from jetkernels.cli.options import UsageError, integer, integers, integers_of, new_folder, number, token_counts
from jetkernels.files import write_atomic
from jetkernels.model import JetNemotronForCausalLM, qwen3
from jetkernels.model.speed import WARM_UP_STEPS, Decoder, measure_speed, time_once

ALONE = {"batch": 1, "prompt_length": 512, "repeats": 3}  # options without --against, and their defaults
# Options of --against, and their defaults.
BESIDE = {
    "peer": None,
    "contexts": (1024, 4096, 16384, 65536),
    "batches": None,
    "memory": None,
    "prefill": False,
    "seconds": 20.0,
    "minutes": None,
    "output": None,
}
PREFILL_CHUNK = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `jetkernels throughput`."""
    add_model_arguments(parser)
    parser.add_argument("--new-tokens", type=integer(1, 2**28), default=32, help="decode steps (default 32)")
    parser.add_argument("--prefill-chunk", type=integer(1), help="prompt tokens per forward")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    alone = parser.add_argument_group("one model")
    alone.add_argument("--batch", type=integer(1, 2**16), help="sequences (default 1)")
    alone.add_argument("--prompt-length", type=integer(1, 2**28), help="tokens of each prompt (default 512)")
    alone.add_argument("--repeats", type=integer(1), help="timed runs; the median counts (default 3)")
    beside = parser.add_argument_group("several models in one run")
    beside.add_argument(
        "--against",
        metavar="CONFIG",
        help="full-attention, a model of the shape of Qwen3-1.7B whose layers are all attn (biases on q, k and v, no "
        "norm of q and k), or the path of a config.json; random weights",
    )
    beside.add_argument(
        "--peer", choices=["transformers"], help="also transformers' Qwen3 in the shape of that config, as it comes"
    )
    beside.add_argument(
        "--contexts", type=token_counts, help="tokens before the first step, e.g. 512,4K (default 1K,4K,16K,64K)"
    )
    beside.add_argument("--batches", type=integers(1, 2**16), help="sequences, e.g. 1,8 (default: the most that fit)")
    beside.add_argument(
        "--memory",
        type=number(0, above=True),
        help="GB (10^9 bytes) that weights, cache and step of a model may take (default: what is available)",
    )
    beside.add_argument(
        "--prefill", action="store_true", default=None, help="also read one prompt of each length, once (minutes)"
    )
    beside.add_argument(
        "--seconds",
        type=number(0, above=True),
        help="of one measurement: behind three timed steps none begins later (default 20)",
    )
    beside.add_argument("--minutes", type=number(0), help="start nothing new after this long")
    beside.add_argument("--output", type=new_folder, help="folder for throughput.json and throughput.png")


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints the result."""
    mine, others = (ALONE, BESIDE) if arguments.against is None else (BESIDE, ALONE)
    for name in others:
        if getattr(arguments, name) is not None:
            with_or_without = "goes with --against" if mine is ALONE else "does not go with --against"
            raise UsageError(f"--{name.replace('_', '-')} {with_or_without}")
    for name, default in mine.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    (run_alone if arguments.against is None else run_beside)(arguments)


def run_alone(arguments: argparse.Namespace) -> None:
    """Prefill and decode of one model."""
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


def run_beside(arguments: argparse.Namespace) -> None:
    """Decode of several models. Each row is printed and written as soon as it is known."""
    # As they come, before anything large is allocated: kept in pieces, what transformers copies anew at each step would
    # take 22 GB where 16 are allowed.
    _machine.keep_freed_memory(_machine.KEPT_BY_GLIBC)
    contenders, limit = _contenders(arguments), _limit(arguments)
    pyplot = arguments.output is None or _can_plot()
    plan = Plan(
        device=arguments.device,
        contexts=arguments.contexts,
        batches=None if arguments.batches is None else integers_of(arguments.batches),
        limit=limit,
        steps=arguments.new_tokens,
        seconds=arguments.seconds,
        prefill_chunk=(arguments.prefill_chunk or PREFILL_CHUNK) if arguments.prefill else None,
        until=time.monotonic() + 60 * (float("inf") if arguments.minutes is None else arguments.minutes),
    )
    result: dict[str, Any] = {
        "provenance": _provenance(arguments.device, contenders[0].dtype),
        "memory_limit_gb": limit / against.GB,
        "models": {each.name: {"weight_bytes": each.weight_bytes, **each.config.to_dict()} for each in contenders},
        "rows": [],
    }
    rows: list[Row] = result["rows"]
    say = partial(print, file=sys.stderr if arguments.json else sys.stdout, flush=True)
    say(against.HEADER)
    try:
        with progress(desc="steps", disable=arguments.json) as bar:
            for row in against.measure(contenders, plan, bar.update):
                rows.append(row)
                say(against.line(row))
                if arguments.output is not None:
                    write_atomic(arguments.output / "throughput.json", (json.dumps(result, indent=1) + "\n").encode())
    finally:  # an interrupted run has something to show too
        if shown := against.summary(rows):
            say(shown)
        if arguments.json:
            print(json.dumps(result, indent=1))
        if arguments.output is not None and pyplot and against.best(rows):
            _plot(arguments.output / "throughput.png", rows, result["provenance"])


def _contenders(arguments: argparse.Namespace) -> list[Contender]:
    ours, other = read_config(arguments), named_config(arguments.against)
    dtype = dtype_of(arguments, ours)
    drawn = partial(random_model, arguments, other, dtype)
    names = (arguments.config or arguments.model, arguments.against)
    first, second = (Path(name).resolve().name.removesuffix(".json") for name in names)
    if second == first:
        second += " (2)"
    found = [
        Contender(first, ours, dtype, partial(load_model, arguments, ours), Decoder, _prefill),
        Contender(second, other, dtype, drawn, Decoder, _prefill),
    ]
    if arguments.peer is not None:
        qwen3.check(other)
        load = partial(qwen3.random_qwen3, other, dtype=dtype, device=arguments.device, seed=arguments.seed)
        name = f"Qwen3 of transformers {qwen3.version()}"
        # Where its cache grows, the old keys and values of a layer still stand beside the new ones.
        found.append(Contender(name, other, dtype, load, qwen3.Qwen3Decoder, qwen3.time_prefill, copied_layers=1))
    return found


def _prefill(model: JetNemotronForCausalLM, ids: torch.Tensor, chunk: int) -> float:
    return time_once(model, ids, model.new_cache(*ids.shape), 0, chunk)[0]


def _limit(arguments: argparse.Namespace) -> float:
    available = memory.available_bytes(arguments.device)
    if arguments.memory is None:
        if available is None:
            raise UsageError("--memory must be given: nobody says what this machine has")
        return float(available)
    memory.require(f"--memory {arguments.memory:g}: models", int(arguments.memory * against.GB), arguments.device)
    return arguments.memory * against.GB


def _can_plot() -> bool:
    """Whether matplotlib is there; that it is not is said at the start, and no reason to measure nothing."""
    from jetkernels.postnas.report import plots

    try:
        plots.need()
    except ModuleNotFoundError as error:
        print(f"no throughput.png: {error}", file=sys.stderr)
        return False
    return True


def _plot(path: Path, rows: list[Row], facts: dict[str, Any]) -> None:
    from jetkernels.postnas.report import plots

    speeds = {
        name: {context: row["tokens_per_second"] for context, row in of_model.items()}
        for name, of_model in against.best(rows).items()
    }
    plots.speed_against_context(path, speeds, against.speed_ups(rows), f"{facts['device']}, {facts['dtype']}")


def _provenance(name: str, dtype: torch.dtype) -> dict[str, Any]:
    device = torch.device(name)
    on_gpu = device.type == "cuda"
    found = _machine.processors()
    if notice := _machine.busy_notice(found, "times measured now are too long and vary; measure again on a quiet one"):
        print(notice, file=sys.stderr, flush=True)
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _machine.processor_name(),
        "driver": _machine.gpu_driver(device.index or 0) if on_gpu else None,
        "threads": torch.get_num_threads(),
        "processors": {"got": round(found.got, 2), "count": found.count},
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "jetkernels": __version__,
        "build": _library.build_info(),
        "commit": _machine.commit(),
        "command": shlex.join(["jetkernels", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
