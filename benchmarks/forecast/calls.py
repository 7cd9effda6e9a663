"""Time of a call from the cycles of its kernels: waves, memory, launches.

The names of the cases are those of benchmarks/ops.py.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from benchmarks import ops
from benchmarks.floors import CHUNK, state_bytes
from benchmarks.forecast import kernels
from benchmarks.forecast.kernels import BACKWARD_IMAGE, IMAGE, Build, Timed
from benchmarks.forecast.machine import ASSUMPTIONS, A
from benchmarks.forecast.sass import ROOT, cuobjdump, newest_first, objects
from benchmarks.report import table, write_text
from benchmarks.shapes import SHAPES, Shape

COMMITTED = ROOT / "benchmarks" / "results" / "forecast" / "forecast.json"
COMMAND = "python -m benchmarks.run --forecast --shape all --write"
MARGIN = 0.10
COLUMNS = {name: name for name in ("case", "kernel", "unit", "cycles", "limit", "us", "of copy, %", "committed")}
OPS = {
    "chunk": "chunk_gated_delta_rule",
    "chunk_backward": "chunk_gated_delta_rule_backward",
    "conv": "dynamic_conv",
    "conv_backward": "dynamic_conv_backward",
    "step": "dynamic_conv_step",
    "recurrent": ops.RECURRENT,
}
ROWS = (1, 8, 64, 256)
STEP_ROWS = (1, 128, 256)


def here() -> Build | None:
    """The newest build of this checkout, if it has CUDA objects and there is a disassembler."""
    files = tuple(objects()) if cuobjdump() else ()
    return Build(files, ROOT / "csrc") if files else None


_timed = cache(lambda model, *arguments: model(*arguments))  # a kernel that several cases share is walked once


class Forecast:
    """The forecasts of a build, case by case."""

    def __init__(self, build: Build):
        self.build = build

    def timed(self, model: Callable[..., Timed], shape: Shape, *arguments) -> Timed:
        return _timed(model, self.build, shape, *arguments)

    def row(self, case: str, kernel: str, unit: str, timed: Timed, us: float) -> dict[str, object]:
        busy = {name: round(n) for name, n in timed.busy.items() if n > 0.1 * timed.cycles and name != "none"}
        return {
            "op": case.partition(" ")[0],
            "case": case,
            "kernel": kernel,
            "unit": unit,
            "cycles": round(timed.cycles),
            "limit": timed.limit,
            "us": round(us, 2),
            "busy": busy,
            "instructions": timed.instructions,
        }

    def prepare(self, case: str, shape: Shape, B: int, T: int, backward: bool = False) -> dict[str, object]:
        sms, clock, chunks = A["multiprocessors"], A["clock"], -(-T // CHUNK)
        ctas = B * chunks * shape.Hk
        count = kernels.per_multiprocessor(ctas) if ctas < 12 * sms else 12
        prepared = self.timed(kernels.prepare, shape, count, backward)
        fill = max(prepared.total - 12 * prepared.cycles, 0)
        compute = prepared.cycles * ctas / sms + fill if ctas >= 12 * sms else prepared.total
        image = BACKWARD_IMAGE if backward else IMAGE
        moved = B * chunks * (shape.Hk * 4 * CHUNK * shape.K + shape.H * (8 * CHUNK + image))
        return self.row(case, "prepare", "CTA", prepared, max(compute / clock, moved / A["bandwidth"]))

    def joins(self, case: str, name: str, shape: Shape, B: int, T: int) -> list[dict[str, object]]:
        """The pass without outputs, forward (cuts) or backward (reverse cuts), and join: if something is cut."""
        segments, longest = segments_of(B, T, shape)
        if segments == 1:
            return []
        cuts = self.timed(kernels.sweep, shape, "reverse" if name == "reverse cuts" else "cuts")
        rows = [self.row(case, name, "chunk", cuts, longest * cuts.cycles / A["clock"] + A["cta"])]
        if segments > 2:
            joined = self.timed(kernels.join, shape, B, segments - 2)
            rows.append(self.row(case, f"{name}: join", "CTA", joined, joined.total / A["light clock"]))
        return rows

    def sweep(self, case: str, which: str, shape: Shape, B: int, T: int) -> dict[str, object]:
        """Of the passes with outputs: waves of CTAs."""
        swept, columns, slices = self.timed(kernels.sweep, shape, which), min(shape.V, 128), -(-shape.V // 128)
        # Slices of a head, and value heads of a key head, read the same rows through the L2.
        rows, values = 2 * CHUNK * shape.K / max(slices, shape.H // shape.Hk), 2 * CHUNK * columns
        per_chunk = {
            "outputs": 2 * rows + IMAGE / slices + 2 * values,
            "states": rows + (IMAGE - 5120) / slices + 2 * values + 2 * shape.K * columns,
            "reverse": 2 * rows + IMAGE / slices + 2 * values + 2 * shape.K * columns,
        }[which]
        segments, longest = segments_of(B, T, shape)
        us, left = 0.0, B * segments * shape.H * slices
        while left > 0:
            wave = min(left, A["multiprocessors"])
            us += longest * max(swept.cycles / A["clock"], wave * per_chunk / A["bandwidth"]) + A["cta"]
            left -= wave
        return self.row(case, "sweep" if which == "outputs" else which, "chunk", swept, us)

    def chunk(self, shape: Shape, B: int, T: int) -> list[dict[str, object]]:
        """The chunked rule: prepare; with cut sequences a pass without outputs and join; sweep."""
        case = ops.chunk(shape, B, T).name
        rows = [self.prepare(case, shape, B, T), *self.joins(case, "cuts", shape, B, T)]
        return self.whole(case, [*rows, self.sweep(case, "outputs", shape, B, T)], replay=1)

    def chunk_backward(self, shape: Shape, B: int, T: int) -> list[dict[str, object]]:
        """Its backward: prepare; with cut sequences what they need in both directions; states, reverse, gradients."""
        case = ops.chunk_backward(shape, B, T).name
        rows = [self.prepare(case, shape, B, T, True), *self.joins(case, "cuts", shape, B, T)]
        rows += [self.sweep(case, "states", shape, B, T), *self.joins(case, "reverse cuts", shape, B, T)]
        rows.append(self.sweep(case, "reverse", shape, B, T))
        head, group = self.timed(kernels.gradients, shape), shape.H // shape.Hk
        per_head = 3 * 2 * CHUNK * shape.V + 2 * 2 * shape.K * shape.V + 9 * 4 * CHUNK + 3 * 4 * CHUNK
        per_item = 4 * 2 * CHUNK * shape.K + group * per_head
        share = A["bandwidth"] / A["multiprocessors"]
        items = kernels.per_multiprocessor(B * -(-T // CHUNK) * shape.Hk)
        us = items * max(group * head.cycles / A["clock"], per_item / share) + A["cta"]
        return self.whole(case, [*rows, self.row(case, "gradients", "head", head, us)])

    def conv(self, shape: Shape, T: int) -> list[dict[str, object]]:
        return self.pingpong_conv(ops.conv(shape, 1, T), shape, T)

    def pingpong_conv(self, case: ops.Case, shape: Shape, tokens: int) -> list[dict[str, object]]:
        timed, epilogue = _timed(kernels.conv, self.build, shape)
        us = max(ping_pong_us(shape, -(-tokens // 256) * 2, timed, epilogue), case.work.bytes / A["bandwidth"])
        return self.whole(case.name, [self.row(case.name, "conv", "tile", timed, us) | {"epilogue": round(epilogue)}])

    def conv_backward(self, shape: Shape, T: int) -> list[dict[str, object]]:
        """Its three passes, and reduce where the third splits the tokens."""
        case, sms, clock = ops.conv_backward(shape, 1, T).name, int(A["multiprocessors"]), A["clock"]
        taps, epilogue = _timed(kernels.input_gradient, self.build, shape)
        us = ping_pong_us(shape, -(-T // 250) * 2, taps, epilogue)  # 125 tokens of a tile are its own
        rows = [self.row(case, "inputs", "tile", taps, us) | {"epilogue": round(epilogue)}]
        columns = hidden_columns(T, shape.R)
        hidden = self.timed_gradient("hidden_gradient", columns, 2, 8)
        cta, ctas = shape.D // 32 * hidden.cycles + 2 * A["copy"], -(-T // 256) * 2 * -(-shape.R // columns)
        rows.append(self.row(case, "hidden", "tile", hidden, -(-ctas // sms) * cta / clock))
        columns, consumers = (192, 3) if -(-shape.R // 192) * 192 < -(-shape.R // 256) * 256 else (256, 2)
        weight = self.timed_gradient("weight_gradient", columns, consumers, 4)
        ctas, weights = -(-shape.D // (32 * consumers)) * 2 * -(-shape.R // columns), shape.D * shape.W * shape.R
        per_split, splits = token_split(T, ctas, weights)
        cta = per_split * weight.cycles + 2 * A["copy"]
        rows.append(self.row(case, "weight", "tile", weight, -(-ctas * splits // sms) * cta / clock))
        if splits > 1:
            nothing = Timed(1, {}, {"memory": 1.0})
            rows.append(self.row(case, "reduce", "", nothing, weights * (8 * splits + 2) / A["bandwidth"]))
        return self.whole(case, rows)

    def timed_gradient(self, kernel: str, *arguments: int) -> Timed:
        return _timed(kernels.gradient_tile, self.build, kernel, *arguments)

    def step(self, shape: Shape, rows: int) -> list[dict[str, object]]:
        """As launch_dynamic_conv chooses the kernel."""
        case = ops.conv_step(shape, rows)
        if rows > 128 and shape.R <= 512:
            return self.pingpong_conv(case, shape, rows)
        timed = self.timed(kernels.conv_step, shape, rows)
        return self.whole(case.name, [self.row(case.name, "step", "CTA", timed, timed.total / A["light clock"])])

    def recurrent(self, shape: Shape, pool, N: int) -> list[dict[str, object]]:
        case = ops.recurrent(shape, N, pool)
        timed = self.timed(kernels.recurrent, shape, pool.itemsize, N)
        us = max(timed.total / A["light clock"], case.work.bytes / A["bandwidth"])
        of_copy = 100 * 2 * N * state_bytes(shape, pool.itemsize) / A["bandwidth"] / us
        return self.whole(
            case.name, [self.row(case.name, "recurrent", "CTA", timed, us) | {"of copy, %": round(of_copy, 1)}]
        )

    def whole(self, case: str, rows: list[dict[str, object]], replay: int = 0) -> list[dict[str, object]]:
        """The kernels, and the call: the sum of them and their launches.

        `replay` finds nothing to do and is a launch alone.
        """
        us = sum(row["us"] for row in rows) + A["launch"] * (len(rows) + replay)
        slowest = max(rows, key=lambda row: row["us"])
        limit = f"{slowest['kernel']}: {slowest['limit']}"
        return [
            *rows,
            {"op": case.partition(" ")[0], "case": case, "kernel": "call", "us": round(us, 2), "limit": limit},
        ]

    def rows(self, shapes: list[Shape], only: str = "") -> Iterator[dict[str, object]]:
        for shape in shapes:
            calls = [(self.chunk, shape, B, T) for B, T in ops.CHUNK_SIZES]
            calls += [(self.chunk_backward, shape, B, T) for B, T in ops.CHUNK_BACKWARD_SIZES]
            if shape.name != "128/128":
                calls += [(call, shape, T) for call in (self.conv, self.conv_backward) for T in ops.CONV_LENGTHS]
                calls += [(self.step, shape, rows) for rows in STEP_ROWS]
                calls += [(self.recurrent, shape, pool, N) for pool in (ops.FP32, ops.BF16) for N in ROWS]
            for call, *arguments in calls:
                if only not in OPS[call.__name__]:
                    continue
                try:
                    yield from call(*arguments)
                except (AssertionError, LookupError) as error:
                    # A kernel that the model does not follow must not hide the others.
                    case = f"{OPS[call.__name__]} {shape.name} {arguments[1:]}"
                    yield {"op": OPS[call.__name__], "case": case, "kernel": "failed", "limit": str(error)[:200]}


def ping_pong_us(shape: Shape, token_tiles: int, timed: Timed, epilogue: float) -> float:
    """choose_channel_split of csrc/dynamic_conv, and the time of so many tiles of tokens."""
    tiles = shape.D // 32
    per_cta = min(range(tiles, 0, -1), key=lambda n: -(-token_tiles * -(-tiles // n) // A["multiprocessors"]) * (n + 2))
    waves = math.ceil(token_tiles * -(-tiles // per_cta) / A["multiprocessors"])
    # Of the first tile the copies, of the last one all; no products beside it.
    ends = 2 * A["copy"] + timed.busy["tensor"] + epilogue
    return waves * ((per_cta - 1) * timed.cycles + ends) / A["clock"]


def hidden_columns(T: int, R: int) -> int:
    """hidden_gradient_columns of csrc/dynamic_conv."""

    def cost(n: int) -> int:
        return -(-(-(-T // 256) * 2 * -(-R // n)) // int(A["multiprocessors"])) * max(8 * n, 840)

    return min((256, 192, 64), key=cost)


def token_split(T: int, ctas: int, weights: int) -> tuple[int, int]:
    """choose_token_split of csrc/dynamic_conv: tiles of 64 tokens of a split, splits."""
    tiles = -(-T // 64)

    def cost(splits: int) -> float:
        waves, per_split = -(-ctas * splits // int(A["multiprocessors"])), -(-tiles // splits)
        return waves * (per_split + 6) + (3 + 8 / 2.7e6 * splits * weights if splits > 1 else 0)

    found = {-(-tiles // -(-tiles // wanted)) for wanted in range(1, min(tiles, 16) + 1)}
    best = min(sorted(found), key=cost)
    return -(-tiles // best), best


def segments_of(B: int, T: int, shape: Shape) -> tuple[int, int]:
    """choose_segments of csrc/gated_delta_rule without cu_seqlens: segments of a row, chunks of the longest."""
    chunks, heads, slices, transfer_slices = -(-T // CHUNK), B * shape.H, -(-shape.V // 128), -(-shape.K // 128)

    def cost(segments: int) -> float:
        def waves(ctas: int) -> int:
            return -(-ctas // int(A["multiprocessors"]))

        segment = -(-chunks // segments) + 3
        outputs = waves(heads * segments * slices) * segment
        if segments == 1:
            return outputs
        effects = waves(heads * ((segments - 1) * slices + (segments - 2) * transfer_slices)) * segment * 0.6
        return outputs + effects + (segments - 2) * 1.5 + 4

    candidates = [chunks // (chunks // parts) for parts in range(2, min(64, chunks // 16) + 1)]
    best = min([1, *candidates], key=cost)
    segments = best if cost(best) <= 0.8 * cost(1) else 1
    return segments, -(-chunks // segments)


def committed() -> dict[tuple[str, str], dict[str, object]]:
    rows = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else []
    return {(row["case"], row["kernel"]): row for row in rows}


def compare(rows: list[dict[str, object]], old: dict[tuple[str, str], dict[str, object]]) -> list[str]:
    """What is slower than the forecast `old`, so much faster that it should be committed, or no longer followed."""
    said, ops_then = [], {row["op"] for row in old.values()}
    for row in rows:
        name = (row["case"], row["kernel"])
        if "us" not in row:
            said += [f"{row['case']}: {row['limit']}"] if row["op"] in ops_then else []
        elif name in old and row["us"] > old[name]["us"] * (1 + MARGIN):
            said.append(f"{row['case']}, {row['kernel']}: {row['us']} us, {old[name]['us']} committed")
        elif name in old and row["us"] < old[name]["us"] * (1 - MARGIN):
            faster = f"{row['us']} us, faster than the {old[name]['us']} committed; commit it: {COMMAND}"
            said.append(f"{row['case']}, {row['kernel']}: {faster}")
    return said


def assumptions() -> str:
    rows = [{"name": name, "value": a.value, "unit": a.unit, "source": a.source} for name, a in ASSUMPTIONS.items()]
    return table(rows, {name: name for name in ("name", "value", "unit", "source")})


def print_forecast(shapes: list[Shape], only: str, where: list[Path], csrc: Path | None, write: bool) -> None:
    if cuobjdump() is None:
        raise SystemExit("needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    of_places = [[place] if place.is_file() else newest_first(place.rglob("*.cu.o")) for place in where]
    files = tuple(file for of_place in of_places for file in of_place) if where else tuple(objects())
    if not files:
        raise SystemExit("no CUDA objects in " + (", ".join(map(str, where)) or "build/"))
    old = committed()
    rows = list(Forecast(Build(files, csrc or ROOT / "csrc")).rows(shapes, only))
    print(table([row | {"committed": old.get((row["case"], row["kernel"]), {}).get("us")} for row in rows], COLUMNS))
    print("\n" + assumptions() + "\n\nNothing here is measured; docs/forecast.md says what it cannot know.")
    if write:
        assert shapes == list(SHAPES) and not only, f"the committed forecast has all shapes: {COMMAND}"
        COMMITTED.parent.mkdir(parents=True, exist_ok=True)
        write_text(COMMITTED, "[\n" + ",\n".join(json.dumps(row) for row in rows if "us" in row) + "\n]\n")
        print(f"written to {COMMITTED}")
