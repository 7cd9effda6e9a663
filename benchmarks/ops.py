"""Calls of the ops at a shape: arguments, floors, results.

What is measured, compared, sanitised and counted is listed here.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.floors import Work
from benchmarks.shapes import Draw, Shape, conv_inputs, delta_rule_inputs

BF16, FP32 = torch.bfloat16, torch.float32
NAMES = {BF16: "bf16", FP32: "fp32"}
RECURRENT = "recurrent_gated_delta_rule"
PLAIN_ASKED = 4  # PlainReason::asked

DECODE_BATCHES = (1, 4, 8, 16, 64, 128, 256, 512, 1024)
VERIFY_BATCHES = (1, 16, 128, 512)
DRAFT_TOKENS = 4
CONV_LENGTHS = (2048, 8192, 32768)
STEP_ROWS = (1, 8, 32, 64, 128, 256)
CHUNK_SIZES = ((1, 2048), (1, 8192), (1, 32768), (4, 8192), (8, 4096))


class Case(NamedTuple):
    op: str  # in torch.ops.jet
    shape: Shape
    size: str
    dtype: str
    work: Work
    make: Callable[[Draw], tuple]  # the op's arguments in order

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape.name} {self.size} {self.dtype}"


# Arguments


def _pool(shape: Shape, B: int, dtype: torch.dtype, draw: Draw) -> tuple[Tensor, Tensor]:
    """States of B sequences, and their rows in random order, as a server's pool would have them."""
    state = draw.normal(B, shape.H, shape.K, shape.V, dtype=dtype, scale=0.1)
    return state, torch.randperm(B, generator=draw.generator, device=draw.device, dtype=torch.int32)


def recurrent(shape: Shape, B: int, pool: torch.dtype, T: int = 1) -> Case:
    def make(draw: Draw) -> tuple:
        inputs = delta_rule_inputs(shape, B, T, BF16, draw)
        return (*inputs.values(), *_pool(shape, B, pool, draw), shape.K**-0.5, True)

    size = f"{B} x {T}" if T > 1 else f"{B}"
    return Case(RECURRENT, shape, size, f"bf16, {NAMES[pool]} pool", floors.recurrent(shape, B, T, pool.itemsize), make)


def _resume_buffers(shape: Shape, B: int, T: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """Keys and updates of T tokens as verify leaves them: keys of length 1."""
    keys = torch.nn.functional.normalize(draw.normal(B, T, shape.Hk, shape.K), dim=-1)
    return keys, draw.normal(B, T, shape.H, shape.V, scale=0.1)


def verify(shape: Shape, B: int, pool: torch.dtype, T: int = DRAFT_TOKENS) -> Case:
    def make(draw: Draw) -> tuple:
        inputs = delta_rule_inputs(shape, B, T, BF16, draw)
        return (
            *inputs.values(),
            *_pool(shape, B, pool, draw),
            *_resume_buffers(shape, B, T, draw),
            shape.K**-0.5,
            True,
        )

    work = floors.verify(shape, B, T, pool.itemsize)
    return Case(f"{RECURRENT}_verify", shape, f"{B} x {T}", f"bf16, {NAMES[pool]} pool", work, make)


def commit(shape: Shape, B: int, pool: torch.dtype, T: int = DRAFT_TOKENS) -> Case:
    """At least one token of each row is accepted, the mean is (T + 1) / 2."""

    def make(draw: Draw) -> tuple:
        g = delta_rule_inputs(shape, B, T, BF16, draw)["g"]
        state, rows = _pool(shape, B, pool, draw)
        return (*_resume_buffers(shape, B, T, draw), g, draw.integers(1, T + 1, B), state, rows)

    work = floors.commit(shape, B, (T + 1) / 2, pool.itemsize)
    return Case(f"{RECURRENT}_commit", shape, f"{B} x {T}", f"{NAMES[pool]} pool", work, make)


def chunk(shape: Shape, B: int, T: int) -> Case:
    def make(draw: Draw) -> tuple:
        return (*delta_rule_inputs(shape, B, T, BF16, draw).values(), None, None, shape.K**-0.5, True)

    return Case("chunk_gated_delta_rule", shape, f"{B} x {T}", "bf16", floors.chunk(shape, B, T), make)


def conv(shape: Shape, B: int, T: int) -> Case:
    def make(draw: Draw) -> tuple:
        return (*conv_inputs(shape, B, T, BF16, draw), None, None, True)

    return Case("dynamic_conv", shape, f"{B} x {T}", "bf16", floors.conv(shape, B, T), make)


def apply_conv(shape: Shape, B: int, T: int) -> Case:
    def make(draw: Draw) -> tuple:
        x = draw.normal(B, T, shape.D, dtype=BF16)
        return (x, draw.normal(B, T, shape.D, shape.W, dtype=BF16), None, None, True)

    return Case("apply_dynamic_conv", shape, f"{B} x {T}", "bf16", floors.apply_conv(shape, B, T), make)


def conv_step(shape: Shape, B: int) -> Case:
    def make(draw: Draw) -> tuple:
        x, hidden, weight, bias = conv_inputs(shape, 1, B, BF16, draw)
        state = draw.normal(B, shape.D, shape.W - 1, dtype=BF16)
        rows = torch.randperm(B, generator=draw.generator, device=draw.device, dtype=torch.int32)
        return (x[0], hidden[0], weight, bias, state, rows, True)

    return Case("dynamic_conv_step", shape, f"{B}", "bf16", floors.conv_step(shape, B), make)


# Lists of cases


def measured(shapes: list[Shape]) -> list[Case]:
    """In order of value: what is at the end is left out when the time is over."""
    cases = [recurrent(s, B, pool) for s in shapes for pool in (FP32, BF16) for B in DECODE_BATCHES]
    cases += [chunk(s, B, T) for s in shapes for B, T in CHUNK_SIZES]
    cases += [conv(s, 1, T) for s in shapes for T in CONV_LENGTHS]
    cases += [conv_step(s, B) for s in shapes for B in STEP_ROWS]
    for op in (verify, commit):
        cases += [op(s, B, pool) for s in shapes for pool in (FP32, BF16) for B in VERIFY_BATCHES]
    return cases + [apply_conv(s, 1, T) for s in shapes for T in CONV_LENGTHS]


def small(shape: Shape) -> list[Case]:
    """Every op once or twice, with tails, at a size that a simulator or a sanitiser finishes."""
    return [
        *(recurrent(shape, B, pool, T) for pool in (FP32, BF16) for B, T in ((3, 1), (2, 3))),
        *(op(shape, 2, pool) for op in (verify, commit) for pool in (FP32, BF16)),
        chunk(shape, 1, 130),
        conv(shape, 1, 130),
        conv_step(shape, 5),
        apply_conv(shape, 2, 67),
    ]


# Calls


def exists(op: str) -> bool:
    """Whether the op is defined and the compiled library implements it."""
    return hasattr(torch.ops.jet, op) and torch._C._dispatch_has_kernel_for_dispatch_key(f"jet::{op}", "CPU")


def function(op: str, namespace: str = "jet") -> Callable:
    return getattr(getattr(torch.ops, namespace), op)


def written(op: str) -> list[int]:
    """Positions of the arguments that the op writes."""
    arguments = function(op).default._schema.arguments
    return [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]


def _named(op: str, returned, args) -> dict[str, Tensor]:
    schema = function(op).default._schema
    returned = returned if isinstance(returned, (tuple, list)) else () if returned is None else (returned,)
    names = [r.name or f"output {i}" for i, r in enumerate(schema.returns)]
    return {**dict(zip(names, returned)), **{schema.arguments[i].name: args[i] for i in written(op)}}


def results(op: str, args: tuple, namespace: str = "jet") -> dict[str, Tensor]:
    """Everything that a call returns or writes, by name."""
    return _named(op, function(op, namespace)(*args), args)


def plain_results(op: str, args: tuple) -> dict[str, Tensor]:
    """The same by plain PyTorch in fp64, on copies of the arguments."""
    wide = [a.to(torch.float64, copy=True) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _named(op, function(op, "jet_plain")(*wide, PLAIN_ASKED), wide)


def served_by(op: str, args: tuple) -> str:
    """Says "kernel", or why the plain path would serve the call; nothing is run."""
    from jetkernels import backend_of

    backend = backend_of(op, *args)
    return f"plain PyTorch: {backend.detail}" if backend.name == "plain" else "kernel"


def rms_error(out: Tensor, ref: Tensor) -> float:
    """RMS(out - ref) / RMS(ref)."""
    out, ref = out.double(), ref.double()
    return ((out - ref).square().mean().sqrt() / ref.square().mean().sqrt().clamp(min=1e-30)).item()


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {name: rms_error(got[name], expected[name]) for name in expected}
