"""`jetkernels throughput --against`: decode steps of several models behind contexts of many lengths, in one run."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from jetkernels import _machine
from jetkernels.cli import memory
from jetkernels.cli.options import out_of_memory
from jetkernels.model import JetNemotronConfig
from jetkernels.model.speed import WARM_UP_STEPS, time_steps

GB = 1e9
LARGEST_BATCH = 4096
# Of the memory, what is left to the process itself and to what a step needs beside weights, cache and logits.
RESERVE = 0.05

Row = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """A model that takes part.

    Attributes:
        name: in tables.
        config: its sizes.
        dtype: of weights and keys.
        load: gives the model.
        decoder: of the model, sequences, context and steps, something with `step()`.
        prefill: of the model, prompts [1, T] and tokens per forward: seconds.
        copied_layers: layers of which a step holds keys and values twice.
    """

    name: str
    config: JetNemotronConfig
    dtype: torch.dtype
    load: Callable[[], Any]
    decoder: Callable[[Any, int, int, int], Any]
    prefill: Callable[[Any, torch.Tensor, int], float]
    copied_layers: int = 0

    @property
    def weight_bytes(self) -> int:
        """Of the model."""
        return memory.parameter_count(self.config) * self.dtype.itemsize

    def bytes_of(self, batch: int, tokens: int) -> dict[str, int]:
        """Where the memory goes: weights, and the cache of `batch` sequences of `tokens` tokens by kind of layer."""
        return {"weights": self.weight_bytes} | memory.cache_bytes_of_kinds(self.config, self.dtype, batch, tokens)

    def needed(self, batch: int, tokens: int) -> int:
        """The bytes of a step: those of `bytes_of`, what it copies, and its logits and widest activations, twice."""
        cache = memory.cache_bytes(self.config, self.dtype, batch, tokens)
        activations = self.config.vocab_size + 4 * (self.config.hidden_size + self.config.intermediate_size)
        copied = cache * self.copied_layers // self.config.num_hidden_layers
        return self.weight_bytes + cache + copied + 2 * batch * activations * self.dtype.itemsize

    def largest_batch(self, tokens: int, limit: float) -> int:
        """The most sequences of `tokens` tokens that fit into `limit` bytes; 0 if not even one does."""
        least, one = self.needed(0, tokens), self.needed(1, tokens)
        return max(0, min(LARGEST_BATCH, int((limit - least) // (one - least))))


@dataclass(frozen=True)
class Plan:
    """What is measured of every contender.

    Attributes:
        device: that the models are on.
        contexts: tokens before the first step.
        batches: sequences; None: the most that fit.
        limit: bytes of a model, its cache and its step.
        steps: that are timed, at most.
        seconds: of one measurement; see `time_steps`.
        prefill_chunk: tokens per forward of a prefill; None: none is timed.
        until: when nothing new is begun, on the clock of `time.monotonic`.
    """

    device: str
    contexts: Sequence[int]
    batches: Sequence[int] | None
    limit: float
    steps: int
    seconds: float
    prefill_chunk: int | None
    until: float


def measure(contenders: Sequence[Contender], plan: Plan, on_call: Callable[[], object] = lambda: None) -> Iterator[Row]:
    """Rows of one contender after the other, each as soon as it is known: results, or why there are none."""
    for contender in contenders:
        model = None
        for context in plan.contexts:
            tokens = context + WARM_UP_STEPS + plan.steps
            largest = contender.largest_batch(tokens, (1 - RESERVE) * plan.limit)
            prompts = [] if plan.prefill_chunk is None else [1]
            for batch in [*prompts, *([largest] if plan.batches is None else plan.batches)]:
                what: Row = {"model": contender.name, "context": context, "batch": batch}
                work = _prefill if prompts else _decode
                prompts = []
                if not 0 < batch <= largest:
                    needed = contender.needed(max(batch, 1), tokens) / (1 - RESERVE)
                    yield what | {"skipped": f"{max(batch, 1)} x {tokens:,} tokens need {needed / GB:.1f} GB"}
                    continue
                if time.monotonic() > plan.until:
                    yield what | {"skipped": "the time was over"}
                    continue
                model = model or contender.load()
                try:
                    yield what | work(contender, model, context, batch, plan, on_call)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    yield what | {"skipped": "out of memory"}
                _free(plan.device)
        model = None
        _free(plan.device)


def _free(device: str) -> None:
    gc.collect()
    _machine.give_back_freed_memory()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def _decode(
    contender: Contender, model: Any, context: int, batch: int, plan: Plan, on_call: Callable[[], object]
) -> Row:
    memory.reset_peak(plan.device)
    decoder = contender.decoder(model, batch, context, WARM_UP_STEPS + plan.steps)
    times = time_steps(decoder.step, torch.device(plan.device), plan.steps, plan.seconds, on_call)
    step, peak = statistics.median(times), memory.peak_bytes(plan.device)
    held = contender.bytes_of(batch, context + WARM_UP_STEPS + plan.steps)
    return {
        "tokens_per_second": batch / step,
        "step_ms": 1e3 * step,
        "step_ms_fastest": 1e3 * min(times),
        "step_ms_slowest": 1e3 * max(times),
        "n": len(times),
        "memory_gb": {name: count / GB for name, count in held.items()},
        "peak_gb": None if peak is None else peak / GB,
    }


def _prefill(
    contender: Contender, model: Any, context: int, batch: int, plan: Plan, on_call: Callable[[], object]
) -> Row:
    assert plan.prefill_chunk is not None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(contender.config.vocab_size, (batch, context), generator=generator).to(plan.device)
    contender.prefill(model, ids[:, : plan.prefill_chunk], plan.prefill_chunk)  # warm-up
    seconds = contender.prefill(model, ids, plan.prefill_chunk)
    on_call()
    return {"prefill_tokens_per_second": batch * context / seconds, "prefill_seconds": seconds, "n": 1}


def best(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """By model and context: the row of the batch that decodes most tokens per second."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if "tokens_per_second" in row:
            of_model = found.setdefault(row["model"], {})
            known = of_model.get(row["context"])
            if known is None or row["tokens_per_second"] > known["tokens_per_second"]:
                of_model[row["context"]] = row
    return found


def speed_ups(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """By other model and context: how many times its tokens per second the first model reaches."""
    (_, first), *others = best(rows).items() or [("", {})]
    return {
        name: {
            context: first[context]["tokens_per_second"] / row["tokens_per_second"]
            for context, row in of_model.items()
            if context in first
        }
        for name, of_model in others
    }


HEADER = f"{'model':28} {'context':>9} {'batch':>6} {'tokens/s':>10} {'step ms':>10} {'n':>4}  memory, GB"


def line(row: Row) -> str:
    """A row of the table under HEADER."""
    start = f"{row['model']:28} {row['context']:>9,} {row['batch']:>6,}"
    if "skipped" in row:
        return f"{start} {'-':>10} {'-':>10} {'-':>4}  {row['skipped']}"
    if "prefill_seconds" in row:
        ms = 1e3 * row["prefill_seconds"]
        return f"{start} {row['prefill_tokens_per_second']:>10,.1f} {ms:>10,.1f} {row['n']:>4}  prefill of one prompt"
    held = ", ".join(f"{name} {count:.2f}" for name, count in row["memory_gb"].items())
    peak = "" if row["peak_gb"] is None else f"; peak of the process {row['peak_gb']:.2f}"
    return f"{start} {row['tokens_per_second']:>10,.2f} {row['step_ms']:>10,.1f} {row['n']:>4}  {held}{peak}"


def summary(rows: Sequence[Row]) -> str:
    """The first model's tokens per second over those of each other, by context; empty with nothing to compare."""
    lines = []
    for name, of_model in speed_ups(rows).items():
        shown = ", ".join(f"{context:,} {ratio:,.1f}x" for context, ratio in sorted(of_model.items()))
        lines.append(f"{rows[0]['model']} against {name}, tokens/s by context: {shown or 'no context in common'}")
    return "\n".join(lines)
