"""The 2B model with random weights, in a process of its own: prefill, decode, decode at key lengths not seen before."""

import statistics
import time

import torch

from benchmarks import measure
from benchmarks.gpu_run import key, store
from benchmarks.gpu_run.supervisor import Job

SHAPE = "2b"
UNSEEN = f"model {SHAPE} key lengths not seen before"
PAST, STEPS = 1000, 24
OPS = ("chunk_gated_delta_rule", "recurrent_gated_delta_rule", "dynamic_conv", "dynamic_conv_step")


def sizes() -> dict[str, int]:
    return {
        f"model {SHAPE} {batch} x {measure.PROMPT} + {measure.NEW_TOKENS}": batch for batch in measure.MODEL_BATCHES
    }


def describe() -> list[str]:
    return [
        measure.MODEL_RATES,
        f"{STEPS} decode steps from {PAST} tokens on, twice: attention may plan anew for each length of keys, "
        "which repeated runs hide",
    ]


def jobs(settings: dict) -> list[Job]:
    return [Job("model", (*sizes(), UNSEEN))]


def load(context):
    if not hasattr(context, "model"):
        from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM

        context.model = JetNemotronForCausalLM.random(
            JetNemotronConfig.from_name(SHAPE), dtype=torch.bfloat16, device=context.device
        ).eval()
    return context.model


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


def work(name: str, context) -> dict[str, object]:
    for op in OPS:
        if blocked := store.blocked(f"{op} {SHAPE}", context.output):
            return {"skipped": blocked}
    model = load(context)
    if name == UNSEEN:
        return unseen(model, PAST, STEPS)
    from tqdm import tqdm

    ceilings, _, _ = key.ceilings(context)
    prefill, decode = measure.measure_model(model, sizes()[name], ceilings, tqdm(disable=True))
    told = {f"prefill_{name}": prefill[name] for name in ("us", "tokens_per_s", "floor_us", "reached_percent")}
    return {**told, **{name: value for name, value in decode.items() if name != "op"}}
