"""The peers beside our ops: same inputs, same process, each peer's output compared with ours first.

A peer whose output differs gets no time. A case is "op shape size / peer"; where our op is broken the peer is timed
alone.
"""

import tempfile
import zipfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import adapters, floors, ops, peers
from benchmarks.gpu_run import store
from benchmarks.gpu_run.supervisor import Job
from benchmarks.measure import timing_row
from benchmarks.peers import Peer
from benchmarks.shapes import SHAPES, Draw, Shape, conv_inputs, delta_rule_inputs
from benchmarks.timing import Timing, device_time, l2_bytes, rotations

# Both sides round 16-bit operands, and some peers q and k after the l2norm: their difference is larger than either's
# error.
DIFFERENCE_CEILING = 2e-2
CHUNK_SIZES = ((8, 4096), (1, 8192), (1, 32768), (1, 2048), (4, 8192))
SLOW = ("plain PyTorch", "transformers")  # measured up to this many tokens only
SLOW_TOKENS = 2048
RECURRENT_BATCHES = (64, 1, 256, 1024)
CONV_LENGTHS = (8192, 2048, 32768)
STEP_ROWS = (1, 32, 128, 256)
GEMM, UNFUSED = "bare GEMM of the generator", "linear, unfold, sum"
TUNING = ("flash-linear-attention",)  # compile and tune at the first call of a shape: after those that need neither


class Problem(NamedTuple):
    """One op at one size, and what is timed beside it."""

    op: str
    shape: Shape
    size: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape.name} {' x '.join(map(str, self.size))}"

    @property
    def peers(self) -> tuple[str, ...]:
        if self.op == "dynamic_conv":
            return (GEMM, UNFUSED)
        if self.op == "dynamic_conv_step":
            return (GEMM,)
        tokens = self.size[0] * self.size[1] if self.op in CHUNKED else 0
        return tuple(peer.name for peer in group_of(self.op) if peer.name not in SLOW or tokens <= SLOW_TOKENS)


CHUNKED = ("chunk_gated_delta_rule", "chunk_gated_delta_rule_backward")


def group_of(op: str) -> tuple[Peer, ...]:
    return dict(zip(CHUNKED, (peers.CHUNK, peers.CHUNK_BACKWARD))).get(op, peers.RECURRENT)


def problems() -> list[Problem]:
    """The published shapes first, and of each op the size that tells most."""
    found = []
    for sizes, op in ((CONV_LENGTHS, "dynamic_conv"), (STEP_ROWS, "dynamic_conv_step")):
        found += [Problem(op, shape, (1, n) if op == "dynamic_conv" else (n,)) for shape in SHAPES for n in sizes]
    found += [Problem("chunk_gated_delta_rule", shape, size) for shape in SHAPES for size in CHUNK_SIZES]
    backward = "chunk_gated_delta_rule_backward"
    found += [Problem(backward, shape, size) for shape in SHAPES for size in ops.CHUNK_BACKWARD_SIZES]
    return found + [Problem(ops.RECURRENT, shape, (B,)) for shape in SHAPES for B in RECURRENT_BATCHES]


def names_of(some: list[Problem]) -> tuple[str, ...]:
    """cuBLAS and plain PyTorch before what tunes itself."""
    pairs = [(problem, peer) for problem in some for peer in problem.peers]
    return tuple(f"{problem.name} / {peer}" for problem, peer in sorted(pairs, key=lambda pair: pair[1] in TUNING))


@cache
def by_name() -> dict[str, Problem]:
    return {problem.name: problem for problem in problems()}


def describe() -> list[str]:
    def group(op: str) -> list[Problem]:
        return [problem for problem in problems() if problem.op == op]

    lines = []
    for op in dict.fromkeys(problem.op for problem in problems()):
        sizes = dict.fromkeys(" x ".join(map(str, problem.size)) for problem in group(op))
        names = dict.fromkeys(name for problem in group(op) for name in problem.peers)
        lines.append(f"{op} at {', '.join(sizes)}: {', '.join(names)}")
    return lines


def jobs(settings: dict) -> list[Job]:
    """A process per op and shape: peers compile once per shape."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems():
        groups.setdefault(f"{problem.op} {problem.shape.name}", []).append(problem)
    return [Job(name, names_of(group)) for name, group in groups.items()]


def install_wheels(folder: Path) -> str:
    """Unpacks the wheels of a folder into a fresh directory; returns its path."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(f"no wheels in {folder}")
    target = tempfile.mkdtemp(prefix="jetkernels-peers-")
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return target


def differences(found: tuple, ours: tuple) -> float:
    """The largest RMS difference of (output, state), relative to ours; raises where it is too large."""
    pairs = [(f, o) for f, o in zip(found, ours) if f is not None and o is not None]
    error = max(ops.rms_error(f, o) for f, o in pairs)
    if not error <= DIFFERENCE_CEILING:
        raise ValueError(f"differs from ours, no time: RMS difference {error:.1e}")
    return error


def beside(ours: Timing | None, timing: Timing) -> dict[str, object]:
    row = timing_row(timing)
    return row | {"ours_us": ours.median * 1e6, "times_ours": timing.median / ours.median} if ours else row


class Prepared(NamedTuple):
    """A problem's inputs, and our side of it: None where our op is broken."""

    inputs: list
    expected: tuple | None
    ours: Timing | None


def our_side(
    calls: Callable[[], list], results: Callable[[], tuple], broken: bool
) -> tuple[tuple | None, Timing | None]:
    """``results`` first: what a call writes in place must not have been written before."""
    if broken:
        return None, None
    from jetkernels import ops as _  # noqa: F401  (registers torch.ops.jet)

    return results(), device_time(calls())


def prepare_chunk(problem: Problem, device: torch.device, broken: bool) -> Prepared:
    shape, (B, T) = problem.shape, problem.size
    sets = rotations(floors.chunk(shape, B, T).bytes, l2_bytes(device))
    inputs = [delta_rule_inputs(shape, B, T, torch.bfloat16, Draw(device, seed)) for seed in range(sets)]

    def call(values):
        return torch.ops.jet.chunk_gated_delta_rule(*values.values(), None, None, shape.K**-0.5, True)

    ours = our_side(lambda: [partial(call, values) for values in inputs], lambda: call(inputs[0]), broken)
    return Prepared([(values,) for values in inputs], *ours)


def prepare_chunk_backward(problem: Problem, device: torch.device, broken: bool) -> Prepared:
    case = ops.chunk_backward(problem.shape, *problem.size)
    made = [case.make(Draw(device, seed)) for seed in range(rotations(case.work.bytes, l2_bytes(device)))]

    def gradients():
        return ops.function(case.op)(*made[0])[:3]

    ours = our_side(lambda: [partial(ops.function(case.op), *args) for args in made], gradients, broken)
    return Prepared([(dict(zip(("q", "k", "v", "g", "beta"), args[2:])), args[0]) for args in made], *ours)


def prepare_recurrent(problem: Problem, device: torch.device, broken: bool) -> Prepared:
    shape, (B,) = problem.shape, problem.size
    sets = rotations(floors.recurrent(shape, B, 1, 4).bytes, l2_bytes(device))
    inputs = []
    for seed in range(sets):
        draw = Draw(device, seed)
        values, a, b = adapters.rounded_gates(delta_rule_inputs(shape, B, 1, torch.bfloat16, draw))
        inputs.append((values, draw.normal(B, shape.H, shape.K, shape.V, scale=0.1), a, b))

    def call(values, pool):
        return torch.ops.jet.recurrent_gated_delta_rule(*values.values(), pool, None, shape.K**-0.5, True)

    def results():
        state = inputs[0][1].clone()
        return call(inputs[0][0], state), state

    return Prepared(
        inputs,
        *our_side(lambda: [partial(call, values, state.clone()) for values, state, _, _ in inputs], results, broken),
    )


def prepare_conv(problem: Problem, device: torch.device, broken: bool) -> Prepared:
    shape, (B, T) = problem.shape, problem.size
    sets = rotations(floors.conv(shape, B, T).bytes, l2_bytes(device))
    inputs = [conv_inputs(shape, B, T, torch.bfloat16, Draw(device, seed)) for seed in range(sets)]

    def call(values):
        return torch.ops.jet.dynamic_conv(*values, None, None, True)

    return Prepared(
        inputs, *our_side(lambda: [partial(call, values) for values in inputs], lambda: call(inputs[0])[:1], broken)
    )


def prepare_step(problem: Problem, device: torch.device, broken: bool) -> Prepared:
    case = ops.conv_step(problem.shape, *problem.size)
    inputs = [case.make(Draw(device, seed)) for seed in range(rotations(case.work.bytes, l2_bytes(device)))]
    return Prepared(
        inputs, *our_side(lambda: [partial(ops.function(case.op), *args) for args in inputs], lambda: (), broken)
    )


PREPARE = {
    "chunk_gated_delta_rule": prepare_chunk,
    "chunk_gated_delta_rule_backward": prepare_chunk_backward,
    ops.RECURRENT: prepare_recurrent,
    "dynamic_conv": prepare_conv,
    "dynamic_conv_step": prepare_step,
}


def prepared(problem: Problem, context) -> Prepared:
    """Once per problem in this process."""
    if getattr(context, "problem", None) != problem:
        context.prepared = None  # its memory first
        broken = store.blocked(problem.name, context.output) is not None
        context.prepared, context.problem = PREPARE[problem.op](problem, context.device, broken), problem
    return context.prepared


def beside_convolution(peer: str, found: Prepared) -> dict[str, object]:
    if peer == GEMM:
        return beside(found.ours, device_time([partial(peers.generator_gemm, *args[:4]) for args in found.inputs]))
    row = (
        {"rms_difference": differences((peers.unfused_dynamic_conv(*found.inputs[0]),), found.expected)}
        if found.expected
        else {}
    )
    return row | beside(
        found.ours, device_time([partial(peers.unfused_dynamic_conv, *values) for values in found.inputs])
    )


def beside_delta_rule(op: str, name: str, found: Prepared) -> dict[str, object]:
    peer = next(peer for peer in group_of(op) if peer.name == name)
    try:
        function = peer.load()
    except Exception as error:  # peers fail at import in many ways
        return {"skipped": f"{type(error).__name__}: {str(error)[:200]}"}
    # What a peer writes in place is its own copy.
    own = [tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in values) for values in found.inputs]
    calls = [peer.prepare(function, *values) for values in own]
    run, read = calls[0]
    row = {"rms_difference": differences(read(run()), found.expected)} if found.expected else {}
    return {
        **row,
        **beside(found.ours, device_time([run for run, _ in calls])),
        **({"note": peer.note} if peer.note else {}),
    }


def work(name: str, context) -> dict[str, object]:
    problem_name, _, peer = name.partition(" / ")
    problem = by_name()[problem_name]
    found = prepared(problem, context)
    if problem.op in ("dynamic_conv", "dynamic_conv_step"):
        return beside_convolution(peer, found)
    return beside_delta_rule(problem.op, peer, found)


def warm(context) -> None:
    """Compiles what tunes itself, at the shapes that are measured; each shape's smallest size first."""
    for problem in sorted(problems(), key=lambda p: p.size):
        for peer in (each for each in problem.peers if each in TUNING):
            with torch.no_grad():
                found = PREPARE[problem.op](problem, context.device, True)
                one = found._replace(inputs=found.inputs[:1])
                try:
                    row = beside_delta_rule(problem.op, peer, one)
                except Exception as error:
                    row = {"failed": str(error)}
            print(f"warm: {problem.name} / {peer}: {row.get('failed') or row.get('skipped') or 'done'}", flush=True)
            if "ImportError" in str(row.get("skipped")) or "ModuleNotFoundError" in str(row.get("skipped")):
                return
