"""The whole model on a CPU against its floors, which are measured in the same run, interleaved with it.

Decode steps of the 2B model in bf16 behind preset contexts, 8-bit weights against bf16, a prefill against its products
alone, and the chunked rule's time per token from short to long sequences. Prints a table and writes
``benchmarks/results/cpu/<date>-<commit>-model.json`` with what is needed to repeat the run.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import jetkernels
from benchmarks.floors import Ceilings, Work
from benchmarks.provenance import processors, provenance
from benchmarks.report import Row, reasons, table, write_text
from benchmarks.rows import SAMPLES, Clock, Rows
from benchmarks.shapes import SHAPES, delta_rule_inputs
from benchmarks.timing import Timing, side_by_side
from jetkernels.model import JetNemotronConfig, JetNemotronForCausalLM
from jetkernels.model.attention_cache import AttentionCache
from jetkernels.model.generation import prefill
from jetkernels.model.mixers import MIXERS
from jetkernels.model.speed import Decoder

COMMAND = "python -m benchmarks.model"
RESULTS = Path(__file__).parent / "results" / "cpu"
K = 1024
COPIED = 1 << 29  # bytes of the large copy: far more than any cache holds
CASES = ((1, 4 * K), (8, 4 * K), (64, 4 * K), (64, 64 * K))  # sequences, tokens before the step
PROMPT = 2048
RULE_TOKENS = (4 * K, 16 * K, 64 * K, 256 * K)
RULE_SAMPLE = 64 * K  # tokens of a sample, at least: a shorter sequence is run several times

COLUMNS = {
    "what": "what",
    "batch": "batch",
    "context": "context",
    "tokens": "tokens",
    "ms": "ms",
    "floor_ms": "floor ms",
    "ratio": "time / floor",
    "ratio_bytes": "time / bytes",
    "bytes_ms": "bytes ms",
    "products_ms": "products ms",
    "gb": "GB",
    "gb_per_s": "copy GB/s",
    "gflop_per_s": "products GFLOP/s",
    "tokens_per_s": "tokens/s",
    "us_per_token": "us/token",
    "against_first": "against the first",
    "us_again": "us/token, same inputs",
    "speed_up": "speed-up over bf16",
    "n": "n",
}


def product_weights(model: JetNemotronForCausalLM) -> list[Tensor]:
    """The weights [out, in] that a token is multiplied by, the head last."""
    embedding = model.model.embed_tokens.weight
    return [w for w in model.model.parameters() if w.dim() == 2 and w is not embedding] + [model.head_weight]


def step_work(model: JetNemotronForCausalLM, batch: int, past: int) -> Work:
    """One decode step: weights, keys and values read once, states read and written once; the products' FLOP."""
    cache = 0
    for kind in model.config.layer_types:
        state = MIXERS[kind].initial_state(model.config, 1, past, device="meta", dtype=model.dtype)
        times = 1 if isinstance(state, AttentionCache) else 2
        cache += times * sum(tensor.nbytes for tensor in state)
    weights = sum(p.nbytes for p in model.parameters())
    return Work(weights + batch * cache, 2 * batch * sum(w.numel() for w in product_weights(model)))


class Products:
    """The products of a pass through the model, by torch's linear, without anything between them.

    They rotate over all weights of the model, so none is found in a cache.
    """

    def __init__(self, model: JetNemotronForCausalLM, rows: int, head_rows: int):
        weights = product_weights(model)
        inputs = {
            (count, w.shape[1]): torch.randn(count, w.shape[1]).to(w.dtype)
            for w in weights
            for count in (rows, head_rows)
        }
        *layers, head = weights
        self.calls = [(inputs[rows, w.shape[1]], w) for w in layers] + [(inputs[head_rows, head.shape[1]], head)]
        self.flop = sum(2 * x.shape[0] * w.numel() for x, w in self.calls)

    def __call__(self) -> None:
        for x, w in self.calls:
            F.linear(x, w)


class Copy:
    """A large copy; its rate counts the bytes read and those written."""

    def __init__(self):
        self.source = torch.ones(COPIED, dtype=torch.uint8)
        self.target = torch.zeros_like(self.source)

    def __call__(self) -> None:
        self.target.copy_(self.source)

    def rate(self, timing: Timing) -> float:
        return 2 * COPIED / timing.median


def samples(timings: dict[str, Timing]) -> dict[str, dict]:
    return {name: timing._asdict() for name, timing in timings.items()}


def decode(model: JetNemotronForCausalLM, batch: int, context: int, rounds: int) -> Row:
    """A step against the larger of its bytes at the rate of a copy and its products at the rate of torch's linear."""
    products, copied = Products(model, batch, batch), Copy()
    decoder = Decoder(model, batch, context, rounds + 2)
    timings = side_by_side({"copy": copied, "products": products, "step": decoder.step}, rounds, warmup=1)
    seconds, work = timings["step"].median, step_work(model, batch, context)
    ceilings = Ceilings(copied.rate(timings["copy"]), products.flop / timings["products"].median)
    return {
        "ms": 1e3 * seconds,
        "floor_ms": 1e3 * work.seconds(ceilings),
        "ratio": seconds / work.seconds(ceilings),
        "ratio_bytes": seconds * ceilings.bandwidth / work.bytes,
        "bytes_ms": 1e3 * (work.bytes / ceilings.bandwidth),  # to the bit what floor_ms is the greater of
        "products_ms": 1e3 * (work.flop / ceilings.tensor),
        "gb": work.bytes / 1e9,
        "gb_per_s": ceilings.bandwidth / 1e9,
        "gflop_per_s": ceilings.tensor / 1e9,
        "tokens_per_s": batch / seconds,
        "n": rounds,
        SAMPLES: samples(timings),
    }


def int8(model: JetNemotronForCausalLM, context: int, rounds: int) -> Row:
    """A step of one sequence with 8-bit weights beside one with those of the model."""
    narrow = JetNemotronForCausalLM.random(model.config, dtype=model.dtype).eval()
    narrow.quantize_(8)  # the head too, as --quantize does
    decoders = {name: Decoder(m, 1, context, rounds + 2) for name, m in (("bf16", model), ("int8", narrow))}
    timings = side_by_side({name: decoder.step for name, decoder in decoders.items()}, rounds, warmup=1)
    seconds = timings["int8"].median
    return {
        "ms": 1e3 * seconds,
        "tokens_per_s": 1 / seconds,
        "speed_up": timings["bf16"].median / seconds,
        "n": rounds,
        SAMPLES: samples(timings),
    }


def prompt(model: JetNemotronForCausalLM, tokens: int, rounds: int) -> Row:
    """A prefill against its products alone; the head sees the last token."""
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    cache, products = model.new_cache(1, tokens), Products(model, tokens, 1)

    def read() -> None:
        cache.reset()
        prefill(model, ids, None, cache)

    timings = side_by_side({"products": products, "prefill": read}, rounds, warmup=1)
    seconds, floor = timings["prefill"].median, timings["products"].median
    return {
        "ms": 1e3 * seconds,
        "floor_ms": 1e3 * floor,
        "ratio": seconds / floor,
        "gflop_per_s": products.flop / floor / 1e9,
        "tokens_per_s": tokens / seconds,
        "n": rounds,
        SAMPLES: samples(timings),
    }


def rule(lengths: Sequence[int], rounds: int) -> list[Row]:
    """The chunked rule at each length: its time per token should not grow.

    Each call has inputs of its own, so that no length finds them in a cache; beside it, calls on the same inputs again.
    """
    shape, longest = SHAPES[0], max(lengths)
    # A draw of the longest would take longer than its measurement.
    drawn = delta_rule_inputs(shape, 1, lengths[0], torch.bfloat16)
    inputs = {name: x.repeat(1, longest // lengths[0], *[1] * (x.dim() - 2)) for name, x in drawn.items()}
    calls = {tokens: max(1, min(RULE_SAMPLE, longest) // tokens) for tokens in lengths}

    def run(tokens: int, again: bool) -> Callable[[], None]:
        starts = [0 if again else i * tokens for i in range(calls[tokens])]
        parts = [{name: x[:, start : start + tokens] for name, x in inputs.items()} for start in starts]

        def call() -> None:
            for part in parts:
                jetkernels.chunk_gated_delta_rule(**part, output_final_state=True, use_qk_l2norm_in_kernel=True)

        return call

    timings = side_by_side(
        {(tokens, again): run(tokens, again) for again in (False, True) for tokens in lengths}, rounds, warmup=1
    )
    per_token = {key: 1e6 * timing.median / calls[key[0]] / key[0] for key, timing in timings.items()}
    return [
        {
            "what": "chunk_gated_delta_rule 2b bf16",
            "tokens": tokens,
            "us_per_token": per_token[tokens, False],
            "against_first": per_token[tokens, False] / per_token[lengths[0], False],
            "us_again": per_token[tokens, True],
            "n": rounds,
            SAMPLES: samples({f"{calls[tokens]} calls": timings[tokens, False], "again": timings[tokens, True]}),
        }
        for tokens in lengths
    ]


@torch.no_grad()
def measure(
    rows: Rows,
    clock: Clock,
    parts: Sequence[str],
    cases: Sequence[tuple[int, int]] = CASES,
    rounds: int = 7,
    config: JetNemotronConfig | None = None,
    prompt_tokens: int = PROMPT,
    lengths: Sequence[int] = RULE_TOKENS,
) -> None:
    """Adds a row per measurement, or why there is none."""
    config, few = config or JetNemotronConfig.from_name("2b"), (rounds + 1) // 2
    if any(part != "rule" for part in parts):
        model = JetNemotronForCausalLM.random(config, dtype=torch.bfloat16).eval()
    if "decode" in parts:
        for batch, context in cases:
            what = {"what": "decode step", "batch": batch, "context": context}
            rows.attempt(clock, lambda b=batch, c=context: decode(model, b, c, rounds), **what)
    if "int8" in parts:
        context = cases[0][1]
        what = {"what": "decode step, int8 weights", "batch": 1, "context": context}
        rows.attempt(clock, lambda: int8(model, context, rounds), **what)
    if "prefill" in parts:
        what = {"what": "prefill", "batch": 1, "tokens": prompt_tokens}
        rows.attempt(clock, lambda: prompt(model, prompt_tokens, few), **what)
    if "rule" in parts:
        model = None
        for row in rule(lengths, few):
            rows.add(**row)


PARTS = ("decode", "int8", "prefill", "rule")


def case(text: str) -> tuple[int, int]:
    """8x4K: eight sequences behind 4096 tokens."""
    batch, context = text.upper().split("X")
    number = context.removesuffix("K")
    return int(batch), int(number) * (K if context != number else 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--cases", nargs="+", type=case, default=CASES, help="of decode, e.g. 1x4K 64x64K")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved; the median counts; prefill and rule: half")
    parser.add_argument("--seconds", type=float, default=1200, help="start nothing new after this long")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    facts, rows = provenance(COMMAND), Rows()
    try:
        measure(rows, Clock(arguments.seconds), arguments.parts, arguments.cases, arguments.rounds)
    finally:  # also what an interrupted run has
        print("\n" + table([row for row in rows.rows if "n" in row], COLUMNS))
        print("\n".join(reasons(rows.rows)))
        facts["processors_after"] = processors()
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"{facts['date'][:10]}-{facts['commit']}-model.json"
        write_text(path, json.dumps({"provenance": facts, "rows": rows.rows}, indent=1) + "\n")
        print(f"written to {path}")


if __name__ == "__main__":
    main()
