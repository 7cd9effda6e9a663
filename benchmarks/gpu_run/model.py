"""The 2B model with random weights, in a process of its own: decode, from a graph and without one, prefill, training.

Decode behind preset contexts, the launches of a step, prompts, and decode at key lengths not seen before.
"""

import statistics
import time

import torch

from benchmarks import measure
from benchmarks.gpu_run import key, store
from benchmarks.gpu_run.supervisor import Job

SHAPE = "2b"
UNSEEN = f"model {SHAPE} key lengths not seen before"
PAST, STEPS = 1000, 24
TRAINING, TRAINING_TOKENS, TRAINING_STEPS = f"model {SHAPE} training step 1 x 4096", 4096, 3
K = 1024
DECODE = tuple((batch, context) for context in (K, 64 * K) for batch in measure.MODEL_BATCHES)
REPLAYS, EAGER_STEPS, SAME_STEPS = 32, 8, 4
ROUNDS = 3
MOST_KERNELS = 12
OPS = (
    "add_rms_norm",
    "attention_step",
    "chunk_gated_delta_rule",
    "delta_gates",
    "dynamic_conv",
    "gated_rms_norm",
    "jet_block_step",
    "rms_norm",
    "swiglu",
)


def decodes() -> dict[str, tuple[int, int]]:
    return {f"model {SHAPE} decode {batch} behind {context}": (batch, context) for batch, context in DECODE}


def sizes() -> dict[str, int]:
    return {
        f"model {SHAPE} {batch} x {measure.PROMPT} + {measure.NEW_TOKENS}": batch for batch in measure.MODEL_BATCHES
    }


def profiled() -> dict[str, tuple[int, int]]:
    return {name + key.KERNELS: size for name, size in decodes().items() if size[1] == K}


def describe() -> list[str]:
    return [
        f"decode steps of {', '.join(f'{batch} behind {context}' for batch, context in DECODE)} tokens, from a CUDA "
        "graph and without one, against the floor; the launches of those behind the short context",
        measure.MODEL_RATES,
        f"{STEPS} decode steps from {PAST} tokens on, twice: attention may plan anew for each length of keys, "
        "which repeated runs hide",
        f"forward and backward of {TRAINING_TOKENS} tokens, and the most memory that they take",
    ]


def jobs(settings: dict) -> list[Job]:
    return [Job("model", (*decodes(), *profiled(), *sizes(), UNSEEN, TRAINING))]


def load(context):
    if not hasattr(context, "model"):
        from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM

        context.model = JetNemotronForCausalLM.random(
            JetNemotronConfig.from_name(SHAPE), dtype=torch.bfloat16, device=context.device
        ).eval()
    return context.model


class Decoding:
    """Greedy steps of sequences behind a preset context, as `generate` does them: nothing is read on the host."""

    def __init__(self, model, batch: int, past: int, steps: int):
        self.model, self.past = model, past
        self.cache = model.new_cache(batch, past + steps)
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=model.device)

    def start(self) -> None:
        self.cache.preset([self.past] * self.cache.batch_size)
        self.tokens.zero_()

    def step(self) -> None:
        self.tokens.copy_(self.model.compute_step(self.tokens, self.cache).argmax(-1))

    def chosen(self, step, count: int) -> torch.Tensor:
        """The tokens of the first steps [steps, N]."""
        self.start()
        found = []
        for _ in range(count):
            step()
            found.append(self.tokens.clone())
        return torch.stack(found)

    def seconds(self, step, count: int) -> float:
        """Of a step, one of so many without a wait between them."""
        from jetkernels.model.speed import synchronize

        synchronize(self.model.device)
        start = time.perf_counter()
        for _ in range(count):
            step()
        synchronize(self.model.device)
        return (time.perf_counter() - start) / count


@torch.no_grad()
def decode(model, batch: int, past: int, ceilings) -> dict[str, object]:
    """A step from a graph and one without, against what it has to move and multiply."""
    from benchmarks.model import step_work
    from jetkernels.model.capture import WARM_UP_CALLS, Repeated

    decoding = Decoding(model, batch, past, WARM_UP_CALLS + SAME_STEPS + ROUNDS * (REPLAYS + EAGER_STEPS))
    decoding.start()
    replay = Repeated(decoding.step, model.device, undo=decoding.start)
    eager = decoding.chosen(decoding.step, SAME_STEPS)
    same = torch.equal(eager, decoding.chosen(replay, SAME_STEPS))
    rounds = [(decoding.seconds(replay, REPLAYS), decoding.seconds(decoding.step, EAGER_STEPS)) for _ in range(ROUNDS)]
    seconds, without = (statistics.median(times) for times in zip(*rounds))
    return {
        "us": seconds * 1e6,
        "eager_us": without * 1e6,
        "tokens_per_s": batch / seconds,
        "same_tokens": same,
        "n": ROUNDS,
        "method": f"clock, {REPLAYS} steps",
        **measure.floor_row(seconds, step_work(model, batch, past), ceilings),
    }


@torch.no_grad()
def launches(model, batch: int, past: int) -> dict[str, object]:
    """How many kernels a step launches, and the time of those that take the most."""
    from torch.profiler import ProfilerActivity, profile

    decoding = Decoding(model, batch, past, 1 + key.PROFILED_CALLS)
    decoding.start()
    decoding.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(key.PROFILED_CALLS):
            decoding.step()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    found = sorted(key.per_kernel(events).items(), key=lambda pair: -pair[1])
    if not found:
        raise RuntimeError("the profiler saw no kernel on the device")
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "launches": sum(event.count for event in on_device) / key.PROFILED_CALLS,
        "kernels": {name: round(us, 1) for name, us in found[:MOST_KERNELS]},
    }


def steps(model, past: int, count: int) -> list[float]:
    """Seconds of each of ``count`` decode steps after ``past`` tokens."""
    from jetkernels.model.generation import prefill
    from jetkernels.model.speed import synchronize

    ids = torch.randint(model.config.vocab_size, (1, past), generator=torch.Generator().manual_seed(0)).to(model.device)
    cache = model.new_cache(1, past + count)
    logits = prefill(model, ids, None, cache, None)
    seconds = []
    for _ in range(count):
        token = logits[:, -1].argmax(-1, keepdim=True)
        synchronize(model.device)
        start = time.perf_counter()
        logits = model(token, cache=cache).logits
        synchronize(model.device)
        seconds.append(time.perf_counter() - start)
    return seconds


def unseen(model, past: int, count: int) -> dict[str, object]:
    first, again = steps(model, past, count), steps(model, past, count)
    us = {
        "us": statistics.median(first) * 1e6,
        "slowest_us": max(first[1:]) * 1e6,
        "again_us": statistics.median(again) * 1e6,
    }
    return {**us, "times_again": us["us"] / us["again_us"], "n": count, "method": "clock, a step"}


def training_step(model, tokens: int, count: int) -> dict[str, object]:
    """Forward and backward of one sequence, without an optimiser; memory beyond parameters and their gradients too."""
    from jetkernels.model.speed import synchronize

    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    seconds = []
    for _ in range(1 + count):  # the first allocates
        model.zero_grad()
        synchronize(model.device)
        start = time.perf_counter()
        logits = model(ids).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, ids[0, 1:]).backward()
        synchronize(model.device)
        seconds.append(time.perf_counter() - start)
    model.zero_grad()
    us = statistics.median(seconds[1:]) * 1e6
    peak = torch.cuda.max_memory_allocated(model.device)
    kept = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    told = {"us": us, "tokens_per_s": tokens / us * 1e6, "n": count, "method": "clock, a step"}
    return {**told, "peak_gib": peak / 2**30, "activations_gib": (peak - kept) / 2**30}


def work(name: str, context) -> dict[str, object]:
    for op in OPS:
        if blocked := store.blocked(f"{op} {SHAPE}", context.output):
            return {"skipped": blocked}
    model = load(context)
    if name == UNSEEN:
        return unseen(model, PAST, STEPS)
    if name == TRAINING:
        return training_step(model, TRAINING_TOKENS, TRAINING_STEPS)
    if name in profiled():
        return launches(model, *profiled()[name])
    ceilings, _, _ = key.ceilings(context)
    if name in decodes():
        return decode(model, *decodes()[name], ceilings)
    from tqdm import tqdm

    prefill, decoded = measure.measure_model(model, sizes()[name], ceilings, tqdm(disable=True))
    told = {f"prefill_{name}": prefill[name] for name in ("us", "tokens_per_s", "floor_us", "reached_percent")}
    return {**told, **{name: value for name, value in decoded.items() if name != "op"}}
