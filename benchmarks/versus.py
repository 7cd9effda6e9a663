"""Measure the peers beside our ops on a GPU: same inputs, same run, each peer's output compared with ours first.

A peer whose output differs gets no time.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import adapters, floors, ops, parts, peers
from benchmarks.measure import timing_row
from benchmarks.parts import Clock, Rows
from benchmarks.peers import Peer
from benchmarks.provenance import provenance
from benchmarks.shapes import Draw, Shape, chosen_shapes, conv_inputs, delta_rule_inputs
from benchmarks.timing import Timing, device_time, l2_bytes, rotations

# Both sides round 16-bit operands, and some peers q and k after the l2norm: their difference is larger than either's error.
DIFFERENCE_CEILING = 2e-2
CHUNK_SIZES = ((1, 8192), (1, 32768), (8, 4096), (1, 2048), (4, 8192))
SLOW = ("plain PyTorch", "transformers")  # measured up to this many tokens only
SLOW_TOKENS = 2048
RECURRENT_BATCHES = (64, 1, 256, 1024)
CONV_LENGTHS = (8192, 2048, 32768)
STEP_ROWS = (1, 32, 128, 256)


def describe() -> list[str]:
    def names(group):
        return ", ".join(peer.name for peer in group)

    return [
        f"chunk_gated_delta_rule at {', '.join(f'{B} x {T}' for B, T in CHUNK_SIZES)}, each at 2b, 4b, 128/128: {names(peers.CHUNK)}",
        f"recurrent_gated_delta_rule at batch {', '.join(map(str, RECURRENT_BATCHES))}: {names(peers.RECURRENT)}",
        f"dynamic_conv at T = {', '.join(map(str, CONV_LENGTHS))}: the generator's bare cuBLAS GEMM; linear, unfold and sum in torch",
        f"dynamic_conv_step at {', '.join(map(str, STEP_ROWS))} rows: the generator's bare cuBLAS GEMM",
    ]


def has_pip() -> bool:
    """Asked of the metadata: setuptools' hook takes find_spec("pip") for pip at work, and torch.compile then fails in this process."""
    try:
        return bool(importlib.metadata.version("pip"))
    except importlib.metadata.PackageNotFoundError:
        return False


def install_wheels(folder: Path) -> str:
    """Puts the wheels of a folder into a fresh directory, without dependencies and without a network; returns its path."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(f"no wheels in {folder}")
    target = tempfile.mkdtemp(prefix="jetkernels-peers-")
    if has_pip():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target", target]
        subprocess.run([*command, "--find-links", str(folder), *map(str, wheels)], check=True)
        return target
    for wheel in wheels:  # an environment without pip: what a wheel holds is the package itself
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return target


class Peers:
    """Peers that can be imported here; each of the others has one row that says why not."""

    def __init__(self, rows: Rows, op: str, group: tuple[Peer, ...]):
        self.functions: dict[str, tuple[Peer, Callable]] = {}
        for peer in group:
            if rows.has(op=op, peer=peer.name, shape="any"):
                continue
            try:
                self.functions[peer.name] = peer, peer.load()
            except Exception as error:  # peers fail at import in many ways
                rows.add(op=op, peer=peer.name, shape="any", skipped=f"{type(error).__name__}: {str(error)[:200]}")

    def fitting(self, tokens: int) -> Iterator[tuple[Peer, Callable]]:
        for peer, function in self.functions.values():
            if peer.name not in SLOW or tokens <= SLOW_TOKENS:
                yield peer, function


def differences(found: tuple, ours: tuple) -> float:
    """The largest RMS difference of (output, state), relative to ours; raises where it is too large."""
    pairs = [(f, o) for f, o in zip(found, ours) if f is not None and o is not None]
    error = max(ops.rms_error(f, o) for f, o in pairs)
    if not error <= DIFFERENCE_CEILING:
        raise ValueError(f"differs from ours, no time: RMS difference {error:.1e}")
    return error


def beside(ours: Timing, timing: Timing) -> dict[str, object]:
    return {**timing_row(timing), "ours_us": ours.median * 1e6, "times_ours": timing.median / ours.median}


def chunk(rows: Rows, clock: Clock, device: torch.device, what: dict[str, str], shape: Shape, B: int, T: int, available: Peers) -> None:
    sets = rotations(floors.chunk(shape, B, T).bytes, l2_bytes(device))
    inputs = [delta_rule_inputs(shape, B, T, torch.bfloat16, Draw(device, seed)) for seed in range(sets)]

    def call(values):
        return torch.ops.jet.chunk_gated_delta_rule(*values.values(), None, None, shape.K**-0.5, True)

    ours = device_time([lambda values=values: call(values) for values in inputs])
    expected = call(inputs[0])
    for peer, function in available.fitting(B * T):

        def measured(peer=peer, function=function) -> dict:
            prepared = [peer.prepare(function, values) for values in inputs]
            run, read = prepared[0]
            difference = differences(read(run()), expected)
            return {"rms_difference": difference, **beside(ours, device_time([run for run, _ in prepared])), "note": peer.note}

        attempt(rows, clock, measured, **what, peer=peer.name)


def recurrent(rows: Rows, clock: Clock, device: torch.device, what: dict[str, str], shape: Shape, B: int, available: Peers) -> None:
    sets = rotations(floors.recurrent(shape, B, 1, 4).bytes, l2_bytes(device))
    problems = []
    for seed in range(sets):
        draw = Draw(device, seed)
        inputs, a, b = adapters.rounded_gates(delta_rule_inputs(shape, B, 1, torch.bfloat16, draw))
        problems.append((inputs, draw.normal(B, shape.H, shape.K, shape.V, scale=0.1), a, b))

    def call(values, pool):
        return torch.ops.jet.recurrent_gated_delta_rule(*values.values(), pool, None, shape.K**-0.5, True)

    expected_state = problems[0][1].clone()
    expected = call(problems[0][0], expected_state), expected_state
    pools = [state.clone() for _, state, _, _ in problems]
    ours = device_time([lambda p=p, pool=pool: call(p[0], pool) for p, pool in zip(problems, pools)])
    del pools
    for peer, function in available.fitting(0):

        def measured(peer=peer, function=function) -> dict:
            fresh = [(inputs, state.clone(), a, b) for inputs, state, a, b in problems]
            prepared = [peer.prepare(function, *problem) for problem in fresh]
            run, read = prepared[0]
            difference = differences(read(run()), expected)
            return {"rms_difference": difference, **beside(ours, device_time([run for run, _ in prepared])), "note": peer.note}

        attempt(rows, clock, measured, **what, peer=peer.name)


def conv(rows: Rows, clock: Clock, device: torch.device, what: dict[str, str], shape: Shape, T: int) -> None:
    sets = rotations(floors.conv(shape, 1, T).bytes, l2_bytes(device))
    inputs = [conv_inputs(shape, 1, T, torch.bfloat16, Draw(device, seed)) for seed in range(sets)]

    def call(values):
        return torch.ops.jet.dynamic_conv(*values, None, None, True)[0]

    def timed(function) -> Timing:
        return device_time([lambda values=values: function(*values) for values in inputs])

    ours, expected = device_time([lambda values=values: call(values) for values in inputs]), call(inputs[0])
    attempt(rows, clock, lambda: beside(ours, timed(peers.generator_gemm)), **what, peer="bare GEMM of the generator")

    def unfused() -> dict:
        difference = differences((peers.unfused_dynamic_conv(*inputs[0]),), (expected,))
        return {"rms_difference": difference, **beside(ours, timed(peers.unfused_dynamic_conv))}

    attempt(rows, clock, unfused, **what, peer="linear, unfold, sum")


def conv_step(rows: Rows, clock: Clock, device: torch.device, what: dict[str, str], shape: Shape, B: int) -> None:
    case = ops.conv_step(shape, B)
    sets = [case.make(Draw(device, seed)) for seed in range(rotations(case.work.bytes, l2_bytes(device)))]
    ours = device_time([lambda args=args: torch.ops.jet.dynamic_conv_step(*args) for args in sets])

    def gemm() -> dict:
        return beside(ours, device_time([lambda args=args: F.linear(args[1], args[2], args[3]) for args in sets]))

    attempt(rows, clock, gemm, **what, peer="bare GEMM of the generator")


def attempt(rows: Rows, clock: Clock, work: Callable[[], dict], **what) -> None:
    if rows.has(**what):
        return
    rows.attempt(clock, work, **what)
    if parts.device_is_lost():
        parts.start_again("versus", rows, clock, lost={"op": what["op"], "peer": what["peer"]})


def sequence(shapes: list[Shape], quick: bool) -> Iterator[tuple[Callable, dict, tuple]]:
    """(function, what, sizes) in order of value; all sizes of a shape together, since peers compile once per shape."""
    sizes = slice(0, 1) if quick else slice(None)
    for shape in shapes:
        for B in RECURRENT_BATCHES[sizes]:
            yield recurrent, {"op": "recurrent_gated_delta_rule", "shape": shape.name, "size": f"{B}, fp32 pool"}, (shape, B)
        for B, T in CHUNK_SIZES[sizes]:
            yield chunk, {"op": "chunk_gated_delta_rule", "shape": shape.name, "size": f"{B} x {T}"}, (shape, B, T)
        for T in CONV_LENGTHS[sizes]:
            yield conv, {"op": "dynamic_conv", "shape": shape.name, "size": f"1 x {T}"}, (shape, T)
        for B in STEP_ROWS[sizes]:
            yield conv_step, {"op": "dynamic_conv_step", "shape": shape.name, "size": f"{B}"}, (shape, B)


@torch.no_grad()
def versus(rows: Rows, clock: Clock, device: torch.device, shapes: list[Shape], quick: bool = False) -> None:
    rows.add(provenance=provenance("python -m benchmarks.versus", device))
    available = {
        chunk: Peers(rows, "chunk_gated_delta_rule", peers.CHUNK),
        recurrent: Peers(rows, "recurrent_gated_delta_rule", peers.RECURRENT),
    }
    for function, what, size in sequence(shapes, quick):
        if rows.is_lost(**what):
            continue
        if clock.left() <= 0:
            rows.add(**what, peer="all", skipped="the time of this part was over")
            continue
        more = (available[function],) if function in available else ()
        try:
            function(rows, clock, device, what, *size, *more)
        except Exception as error:  # our own op failed: the other sizes still count
            rows.add(**what, peer="ours", failed=f"{type(error).__name__}: {str(error)[:300]}")
            if parts.device_is_lost():
                parts.start_again("versus", rows, clock, lost={"op": what["op"]})


def main() -> None:
    parser = parts.parser("versus", __doc__)
    parser.add_argument("--wheels", type=Path, help="folder of wheels of the peers")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device")
        raise SystemExit(parts.SKIPPED)
    if arguments.wheels:
        sys.path.insert(0, install_wheels(arguments.wheels))
    from jetkernels import ops as _  # noqa: F401  (registers torch.ops.jet)

    rows = Rows(arguments.rows, arguments.resume)
    device = torch.device("cuda", torch.cuda.current_device())
    versus(rows, Clock(arguments.seconds), device, chosen_shapes(arguments.shape), arguments.quick)
    raise SystemExit(parts.failed(rows.rows))


if __name__ == "__main__":
    main()
