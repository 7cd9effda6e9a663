"""The library's benchmark of a model: prefill and decode tokens per second, and the size of the cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cache import JetNemotronCache
from .generation import most_likely, prefill
from .hybrid import JetNemotronForCausalLM

WARM_UP_STEPS = 4
FEWEST_STEPS = 3


@dataclass(frozen=True)
class Speed:
    """Medians over several timed runs.

    Attributes:
        batch: sequences.
        prompt_length: tokens of each prompt.
        new_tokens: decode steps.
        prefill_seconds: of all prompts.
        decode_seconds: of `new_tokens` steps of the batch.
        cache_bytes: of the cache of the batch.
        runs: that were timed.
    """

    batch: int
    prompt_length: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    cache_bytes: int
    runs: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens of the whole batch."""
        return self.batch * self.prompt_length / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens of the whole batch."""
        return self.batch * self.new_tokens / self.decode_seconds


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def time_once(
    model: JetNemotronForCausalLM,
    ids: torch.Tensor,
    cache: JetNemotronCache,
    new_tokens: int,
    chunk: int | None = None,
    on_call: Callable[[], object] = lambda: None,
) -> tuple[float, float]:
    """Times one prefill and the decode steps after it.

    Args:
        model: on the device that is measured.
        ids: prompts [B, T].
        cache: of the model, with room for prompts and new tokens; it is reset.
        new_tokens: decode steps.
        chunk: prompt tokens per forward; all by default.
        on_call: called after the prefill and after each step.

    Returns: seconds of the prefill, and seconds of the steps.
    """
    cache.reset()
    synchronize(model.device)
    start = time.perf_counter()
    logits = prefill(model, ids, None, cache, chunk)
    synchronize(model.device)
    middle = time.perf_counter()
    on_call()
    for _ in range(new_tokens):
        logits = model(most_likely(logits[:, -1])[:, None], cache=cache).logits
        on_call()
    synchronize(model.device)
    return middle - start, time.perf_counter() - middle


class Decoder:
    """The decode steps of a model behind contexts that nobody had to read: the cache is preset.

    Args:
        model: on the device that is measured.
        batch: sequences.
        context: tokens before the first step, of each.
        steps: that there is room for.
        seed: of keys, values, states and the first tokens.

    Attributes:
        cache: of the sequences.
    """

    def __init__(self, model: JetNemotronForCausalLM, batch: int, context: int, steps: int, seed: int = 0):
        self.model = model
        self.cache = model.new_cache(batch, context + steps)
        self.cache.preset([context] * batch, seed)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)

    @torch.no_grad()
    def step(self) -> None:
        """Reads one token of each sequence and chooses the most likely next one."""
        self.tokens = most_likely(self.model(self.tokens, cache=self.cache).logits[:, -1])[:, None]


def decode_speed(
    model: JetNemotronForCausalLM, context: int, steps: int = 32, seconds: float = 20.0
) -> tuple[float, int]:
    """Decode tokens per second of one sequence behind a context that nobody had to read, and the bytes of its cache.

    Args:
        model: on the device that is measured.
        context: tokens before the first step.
        steps: that are timed, at most (`time_steps`); the speed is that of the median one.
        seconds: behind which none begins (`time_steps`).
    """
    for name, value in (("context", context), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    decoder = Decoder(model, 1, context, WARM_UP_STEPS + steps)
    times = time_steps(decoder.step, model.device, steps, seconds)
    return 1 / statistics.median(times), decoder.cache.nbytes


def time_steps(
    step: Callable[[], object],
    device: torch.device,
    steps: int,
    seconds: float,
    on_call: Callable[[], object] = lambda: None,
) -> list[float]:
    """Seconds of each of a number of calls, each waited for.

    Up to WARM_UP_STEPS calls come before and do not count: fewer where they take a quarter of `seconds`.

    Args:
        step: what is timed.
        device: that it runs on.
        steps: that are timed, at most.
        seconds: behind FEWEST_STEPS none begins when they have taken this long.
        on_call: called after each.
    """

    def timed() -> float:
        start = time.perf_counter()
        step()
        synchronize(device)
        end = time.perf_counter()
        on_call()
        return end - start

    synchronize(device)
    warm_up: list[float] = []
    while len(warm_up) < WARM_UP_STEPS and sum(warm_up) < seconds / 4:
        warm_up.append(timed())
    times: list[float] = []
    while len(times) < steps and (len(times) < FEWEST_STEPS or sum(times) < seconds):
        times.append(timed())
    return times


def measure_speed(
    model: JetNemotronForCausalLM,
    batch: int,
    prompt_length: int,
    new_tokens: int,
    repeats: int = 3,
    *,
    prefill_chunk: int | None = None,
    seed: int = 0,
    on_call: Callable[[], object] = lambda: None,
) -> Speed:
    """Times `repeats` runs on random prompts after a short one that is not counted.

    Args:
        model: on the device that is measured.
        batch: sequences.
        prompt_length: tokens of each prompt.
        new_tokens: decode steps after the prompts.
        repeats: runs that are timed.
        prefill_chunk: prompt tokens per forward; all by default.
        seed: of the prompts.
        on_call: called after each prefill and each step.
    """
    for name, value in (
        ("batch", batch),
        ("prompt_length", prompt_length),
        ("new_tokens", new_tokens),
        ("repeats", repeats),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (batch, prompt_length), generator=generator).to(model.device)
    cache = model.new_cache(batch, prompt_length + new_tokens)
    time_once(model, ids, cache, min(new_tokens, WARM_UP_STEPS), prefill_chunk, on_call)
    times = [time_once(model, ids, cache, new_tokens, prefill_chunk, on_call) for _ in range(repeats)]
    prefill_seconds, decode_seconds = (statistics.median(column) for column in zip(*times))
    return Speed(batch, prompt_length, new_tokens, prefill_seconds, decode_seconds, cache.nbytes, repeats)
