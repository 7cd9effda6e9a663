"""Measure the ops and the model on a GPU: ceilings of this device, then every op against its floor.

A case whose results are wrong gets no time.
"""

import gc
from functools import partial

import torch

from benchmarks import ops
from benchmarks.floors import Ceilings, Work
from benchmarks.ops import Case
from benchmarks.provenance import provenance
from benchmarks.rows import Clock, Rows, device_is_lost, reason
from benchmarks.shapes import SHAPES, Draw, Shape
from benchmarks.timing import Timing, device_time, l2_bytes, rotations

ERROR_CEILING = 5e-3  # outputs and states with bf16 operands, RMS against fp64
COPY_BYTES = 1 << 32
PRODUCT = 8192
EMPTY_LAUNCHES = 64
LAUNCH_MATTERS = 50e-6  # s: below, the time over an empty launch is told too
MODEL_BATCHES = (1, 16, 128)
MODEL_SECONDS = 40  # at most
PROMPT, NEW_TOKENS = 512, 32
# What describe() says here and in gpu_run.
CEILINGS = f"ceilings: a copy of {COPY_BYTES >> 30} GiB, a {PRODUCT}^3 bf16 product, an empty launch in a graph"
MODEL_RATES = f"prompts of {PROMPT}: prefill and decode tokens/s at batch {', '.join(map(str, MODEL_BATCHES))}"


def describe() -> list[str]:
    cases = ops.measured(list(SHAPES))
    sizes: dict[str, list[str]] = {}
    for case in cases:
        known = sizes.setdefault(f"{case.op} ({case.dtype})", [])
        known += [case.size] if case.size not in known else []
    return [
        CEILINGS,
        *(f"{name}, at 2b, 4b and 128/128: {', '.join(known)}" for name, known in sizes.items()),
        f"the 2B model with random weights, {MODEL_RATES}",
    ]


def timing_row(timing: Timing) -> dict[str, object]:
    return {
        "us": timing.median * 1e6,
        "us_fastest": timing.fastest * 1e6,
        "us_slowest": timing.slowest * 1e6,
        "n": timing.n,
        "method": timing.method,
    }


def floor_row(seconds: float, work: Work, ceilings: Ceilings) -> dict[str, float]:
    floor = work.seconds(ceilings)
    return {
        "floor_us": floor * 1e6,
        "reached_percent": 100 * floor / seconds,
        "gb_per_s": work.bytes / seconds / 1e9,
        "tflop_per_s": work.flop / seconds / 1e12,
    }


def measure_ceilings(rows: Rows, device: torch.device) -> tuple[Ceilings, float]:
    """(ceilings, seconds of an empty launch in a graph)."""
    source = Draw(device).normal(COPY_BYTES // 4)
    target = torch.empty_like(source)
    copy = device_time([partial(target.copy_, source)])
    rows.add(op="copy", size=f"{COPY_BYTES >> 30} GiB", **timing_row(copy), gb_per_s=2 * COPY_BYTES / copy.median / 1e9)
    del source, target
    draw = Draw(device)
    a, b = (draw.normal(PRODUCT, PRODUCT, dtype=torch.bfloat16) for _ in "ab")
    product = device_time([lambda: a @ b], seconds=0.5)
    rows.add(
        op="bf16 product",
        size=f"{PRODUCT}^3",
        **timing_row(product),
        tflop_per_s=2 * PRODUCT**3 / product.median / 1e12,
    )
    empty = device_time([empty_launch] * EMPTY_LAUNCHES)
    rows.add(op="empty launch", size="in a graph", **timing_row(empty))
    return Ceilings(2 * COPY_BYTES / copy.median, 2 * PRODUCT**3 / product.median), empty.median


def empty_launch() -> None:
    from jetkernels import _library

    status = _library.empty_launch(torch.cuda.current_stream().cuda_stream)
    if status != 0:
        raise RuntimeError(f"empty launch failed with cudaError {status}")


def checked(case: Case, device: torch.device) -> dict[str, object]:
    """Who serves this call, and its errors against plain PyTorch in fp64; raises where they are too large."""
    served = ops.served_by(case.op, case.make(Draw(device, seed=1)))
    args = case.make(Draw(device, seed=1))
    expected = ops.plain_results(case.op, args)
    found = ops.errors(ops.results(case.op, args), expected)
    if not all(error <= ERROR_CEILING for error in found.values()):  # NaN never passes
        raise ValueError(f"wrong result, no time: RMS errors {', '.join(f'{n} {e:.1e}' for n, e in found.items())}")
    return {"served_by": served, "rms_error": max(found.values(), default=0.0)}


def timed(case: Case, device: torch.device) -> Timing:
    op = ops.function(case.op)
    sets = rotations(case.work.bytes, l2_bytes(device))
    arguments = [case.make(Draw(device, seed=2 + i)) for i in range(sets)]
    return device_time([lambda args=args: op(*args) for args in arguments])


def measure_case(case: Case, device: torch.device, ceilings: Ceilings, empty: float) -> dict[str, object]:
    facts = checked(case, device)
    timing = timed(case, device)
    row = {**facts, **timing_row(timing), **floor_row(timing.median, case.work, ceilings)}
    return row | ({"above_empty_us": (timing.median - empty) * 1e6} if timing.median < LAUNCH_MATTERS else {})


def measure_model(model, batch: int, ceilings: Ceilings, bar) -> list[dict[str, object]]:
    """Rows of prefill and decode, by the host's clock around the whole model, as `jetkernels throughput` measures."""
    from benchmarks.model import step_work
    from jetkernels.model.speed import measure_speed

    speed = measure_speed(model, batch, PROMPT, NEW_TOKENS, repeats=3, on_call=bar.update)
    prefill, decode = speed.prefill_seconds, speed.decode_seconds
    step = decode / NEW_TOKENS
    work = step_work(model, batch, PROMPT)
    prefill_work = Work(work.bytes, 2 * batch * PROMPT * sum(p.numel() for p in model.parameters()))
    common = {"method": "clock", "n": speed.runs, "served_by": "the model"}
    timed = (("model prefill", prefill, batch * PROMPT, prefill_work), ("model decode step", step, batch, work))
    return [
        {
            "op": op,
            "us": seconds * 1e6,
            "tokens_per_s": tokens / seconds,
            **common,
            **floor_row(seconds, work, ceilings),
        }
        for op, seconds, tokens, work in timed
    ]


def measure_models(rows: Rows, clock: Clock, device: torch.device, ceilings: Ceilings) -> None:
    from tqdm import tqdm

    from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM

    what = {"shape": "2b", "dtype": "bf16"}
    if clock.left() < 15:
        rows.add(op="model", **what, skipped="the time was over")
        return
    config = JetNemotronConfig.from_name("2b")
    model = JetNemotronForCausalLM.random(config, dtype=torch.bfloat16, device=device).eval()
    for batch in MODEL_BATCHES:
        size = f"{batch} x {PROMPT} + {NEW_TOKENS}"
        if clock.left() <= 0:
            rows.add(op="model", **what, size=size, skipped="the time was over")
            continue
        try:
            found = measure_model(model, batch, ceilings, tqdm(disable=True))
        except Exception as error:  # the other batches still count
            rows.add(op="model", **what, size=size, failed=reason(error))
            continue
        for row in found:
            rows.add(**what, size=size, **row)


@torch.no_grad()
def measure(
    rows: Rows, clock: Clock, device: torch.device, shapes: list[Shape], op: str = "", model: bool = True
) -> None:
    """``op``: only the ops whose name contains it."""
    rows.add(provenance=provenance("python -m benchmarks.run", device))
    ceilings, empty = measure_ceilings(rows, device)
    if model:
        # The model first: it is what everything else is for, and it is short.
        measure_models(rows, Clock(min(clock.left(), MODEL_SECONDS)), device, ceilings)
        gc.collect(), torch.cuda.empty_cache()
    for case in ops.measured(shapes):
        what = {"op": case.op, "shape": case.shape.name, "size": case.size, "dtype": case.dtype}
        if op not in case.op:
            continue
        if not ops.exists(case.op):
            rows.add(**what, skipped="this library has no such op")
            continue
        rows.attempt(clock, lambda case=case: measure_case(case, device, ceilings, empty), **what)
        if device_is_lost():
            lost = "the device was lost here; what comes after it was not measured. --op chooses one op, for the others"
            rows.add(**what, failed=lost)
            return
