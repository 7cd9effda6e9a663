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

DECODE_BATCHES = (1, 4, 8, 16, 64, 128, 256, 512, 1024)
VERIFY_BATCHES = (1, 16, 128, 512)
DRAFT_TOKENS = 4
CONV_LENGTHS = (2048, 8192, 32768)
STEP_ROWS = (1, 8, 32, 64, 128, 256)
NORM_TOKENS = (1, 128, 8192)
POINTWISE_ROWS = (1, 64, 8192)
TRAINING_TOKENS = (2048, 8192)
ATTENTION_CACHES = ((1, 4096), (1, 65536), (16, 4096), (16, 65536), (128, 4096))
BLOCK_STEP_ROWS = (1, 16, 128)
V_FIRST_BATCHES = (1, 16, 128)
PREFILL_SIZES = ((1, 8192), (16, 512), (64, 128))
CHUNK_SIZES = ((1, 2048), (1, 8192), (1, 32768), (4, 8192), (8, 4096))
CHUNK_BACKWARD_SIZES = ((1, 8192), (1, 32768), (8, 4096))


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


def recurrent(shape: Shape, B: int, pool: torch.dtype, T: int = 1, v_first: bool = False) -> Case:
    """v_first: in a pool [P, H, V, K], as vLLM and SGLang keep it."""

    def make(draw: Draw) -> tuple:
        inputs = delta_rule_inputs(shape, B, T, BF16, draw)
        state, rows = _pool(shape, B, pool, draw)
        state = state.mT.contiguous().mT if v_first else state
        return (*inputs.values(), state, rows, shape.K**-0.5, True)

    size, kind = f"{B} x {T}" if T > 1 else f"{B}", f"{NAMES[pool]} pool{', V first' if v_first else ''}"
    return Case(RECURRENT, shape, size, f"bf16, {kind}", floors.recurrent(shape, B, T, pool.itemsize), make)


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


def prefill(shape: Shape, N: int, T: int, v_first: bool = False) -> Case:
    """N sequences of T tokens that go on from their rows of an fp32 pool."""

    def make(draw: Draw) -> tuple:
        inputs = delta_rule_inputs(shape, 1, N * T, BF16, draw)
        state, rows = _pool(shape, N, FP32, draw)
        state = state.mT.contiguous().mT if v_first else state
        cu_seqlens = torch.arange(0, (N + 1) * T, T, device=draw.device, dtype=torch.int32)
        return (*inputs.values(), state, rows, cu_seqlens, None, None, None, shape.K**-0.5, True)

    dtype = f"bf16, fp32 pool{', V first' if v_first else ''}"
    return Case("prefill_gated_delta_rule", shape, f"{N} x {T}", dtype, floors.prefill(shape, N, T), make)


def conv(shape: Shape, B: int, T: int) -> Case:
    def make(draw: Draw) -> tuple:
        return (*conv_inputs(shape, B, T, BF16, draw), None, None, True)

    return Case("dynamic_conv", shape, f"{B} x {T}", "bf16", floors.conv(shape, B, T), make)


def apply_conv(shape: Shape, B: int, T: int) -> Case:
    def make(draw: Draw) -> tuple:
        x = draw.normal(B, T, shape.D, dtype=BF16)
        return (x, draw.normal(B, T, shape.D, shape.W, dtype=BF16), None, None, True)

    return Case("apply_dynamic_conv", shape, f"{B} x {T}", "bf16", floors.apply_conv(shape, B, T), make)


def backward(forward: Case, work: Work) -> Case:
    """Of a convolution without states: grad_y and no grad_conv_state_out stand before the forward's arguments."""

    def make(draw: Draw) -> tuple:
        arguments = forward.make(draw)
        return (draw.normal(*arguments[0].shape, dtype=BF16), None, *arguments)

    return forward._replace(op=f"{forward.op}_backward", work=work, make=make)


def conv_backward(shape: Shape, B: int, T: int) -> Case:
    return backward(conv(shape, B, T), floors.conv_backward(shape, B, T))


def apply_conv_backward(shape: Shape, B: int, T: int) -> Case:
    return backward(apply_conv(shape, B, T), floors.apply_conv_backward(shape, B, T))


def conv_step(shape: Shape, B: int) -> Case:
    def make(draw: Draw) -> tuple:
        x, hidden, weight, bias = conv_inputs(shape, 1, B, BF16, draw)
        state = draw.normal(B, shape.D, shape.W - 1, dtype=BF16)
        rows = torch.randperm(B, generator=draw.generator, device=draw.device, dtype=torch.int32)
        return (x[0], hidden[0], weight, bias, state, rows, True)

    return Case("dynamic_conv_step", shape, f"{B}", "bf16", floors.conv_step(shape, B), make)


def norm(op: str, shape: Shape, N: int) -> Case:
    """Of N tokens: of their hidden states [N, 4 R], or of the delta rule's outputs [N, H, V]."""
    sizes = (N, shape.H, shape.V) if op == "gated_rms_norm" else (N, 4 * shape.R)

    def make(draw: Draw) -> tuple:
        x, other = (draw.normal(*sizes, dtype=BF16) for _ in range(2))
        tensors = (x,) if op == "rms_norm" else (x, other)
        return (*tensors, draw.normal(sizes[-1], dtype=BF16), 1e-6)

    rows = N * shape.H if op == "gated_rms_norm" else N
    return Case(op, shape, f"{N}", "bf16", floors.norm(op, rows, sizes[-1]), make)


def swiglu(shape: Shape, rows: int) -> Case:
    def make(draw: Draw) -> tuple:
        return draw.normal(rows, 2 * shape.F, dtype=BF16).chunk(2, -1)  # halves of one projection

    return Case("swiglu", shape, f"{rows}", "bf16", floors.swiglu(shape, rows), make)


def delta_gates(shape: Shape, tokens: int) -> Case:
    def make(draw: Draw) -> tuple:
        a, b = draw.normal(tokens, 2 * shape.H, dtype=BF16).chunk(2, -1)
        return (a, b, draw.normal(shape.H), draw.normal(shape.H))

    return Case("delta_gates", shape, f"{tokens}", "bf16", floors.delta_gates(shape, tokens), make)


def _backward(forward: Case, work: Work, grads: Callable[[Draw, Tensor], tuple]) -> Case:
    """The backward of `forward`; grads(draw, its first argument) are the gradients of its results."""

    def make(draw: Draw) -> tuple:
        arguments = forward.make(draw)
        return (*grads(draw, arguments[0]), *arguments)

    return forward._replace(op=f"{forward.op}_backward", work=work, make=make)


def chunk_backward(shape: Shape, B: int, T: int) -> Case:
    """Of the outputs alone: the final state has no gradient."""

    def grads(draw: Draw, q: Tensor) -> tuple:
        return draw.normal(B, T, shape.H, shape.V, dtype=BF16), None

    return _backward(chunk(shape, B, T), floors.chunk_backward(shape, B, T), grads)


def norm_backward(op: str, shape: Shape, N: int) -> Case:
    def grads(draw: Draw, x: Tensor) -> tuple:
        return tuple(draw.normal(*x.shape, dtype=BF16) for _ in range(2 if op == "add_rms_norm" else 1))

    rows, columns = (N * shape.H, shape.V) if op == "gated_rms_norm" else (N, 4 * shape.R)
    return _backward(norm(op, shape, N), floors.norm_backward(op, rows, columns), grads)


def swiglu_backward(shape: Shape, rows: int) -> Case:
    def grads(draw: Draw, gate: Tensor) -> tuple:
        return (draw.normal(*gate.shape, dtype=BF16),)

    return _backward(swiglu(shape, rows), floors.swiglu_backward(shape, rows), grads)


def delta_gates_backward(shape: Shape, tokens: int) -> Case:
    def grads(draw: Draw, a: Tensor) -> tuple:
        return draw.normal(*a.shape), draw.normal(*a.shape)

    return _backward(delta_gates(shape, tokens), floors.delta_gates_backward(shape, tokens), grads)


def attention_step(shape: Shape, N: int, L: int) -> Case:
    """Of N sequences whose caches of L slots are full but for the new token's."""
    assert shape.A is not None
    H, Hkv, d = shape.A

    def make(draw: Draw) -> tuple:
        q, k, v = (draw.normal(N, n, d, dtype=BF16) for n in (H, Hkv, Hkv))
        angles = draw.normal(N, d // 2).repeat(1, 2)
        key, value = (draw.normal(N, Hkv, L, d, dtype=BF16) for _ in range(2))
        lengths = torch.full((N,), L - 1, device=draw.device)
        return q, k, v, angles.cos(), angles.sin(), key, value, lengths, d**-0.5

    return Case("attention_step", shape, f"{N} x {L}", "bf16", floors.attention_step(shape.A, N, L), make)


def jet_block_step(shape: Shape, N: int, pool: torch.dtype = FP32) -> Case:
    """Of views of one fused projection, as the layer calls it; states in random order."""
    H, K, V, D, R = shape.H, shape.K, shape.V, shape.D, shape.R

    def make(draw: Draw) -> tuple:
        sizes = (H * K, H * K, D, D, R, H, H)  # as JetBlock.projections orders them
        q, k, v, gate, hidden, a, b = draw.normal(N, sum(sizes), dtype=BF16).split(sizes, -1)
        q, k, gate = (t.unflatten(-1, (H, -1)) for t in (q, k, gate))
        _, _, weight, bias = conv_inputs(shape, 1, 1, BF16, draw)
        per_head, norm_weight = (draw.normal(H), draw.normal(H)), draw.normal(V, dtype=BF16)
        conv_state = draw.normal(N, D, shape.W - 1, dtype=BF16)
        state, rows = _pool(shape, N, pool, draw)
        tokens = (q, k, v, hidden, a, b, gate)
        return (*tokens, weight, bias, *per_head, norm_weight, conv_state, state, rows, K**-0.5, 1e-5)

    work = floors.jet_block_step(shape, N, pool.itemsize)
    return Case("jet_block_step", shape, f"{N}", f"bf16, {NAMES[pool]} pool", work, make)


# Lists of cases


def measured(shapes: list[Shape]) -> list[Case]:
    """In order of value: what is at the end is left out when the time is over."""
    cases = [recurrent(s, B, pool) for s in shapes for pool in (FP32, BF16) for B in DECODE_BATCHES]
    cases += [chunk(s, B, T) for s in shapes for B, T in CHUNK_SIZES]
    cases += [chunk_backward(s, B, T) for s in shapes for B, T in CHUNK_BACKWARD_SIZES]
    cases += [prefill(s, N, T, s.Hk < s.H) for s in shapes for N, T in PREFILL_SIZES]
    cases += [recurrent(s, B, FP32, v_first=True) for s in shapes if s.Hk < s.H for B in V_FIRST_BATCHES]
    cases += [conv(s, 1, T) for s in shapes for T in CONV_LENGTHS]
    cases += [conv_step(s, B) for s in shapes for B in STEP_ROWS]
    for op in (verify, commit):
        cases += [op(s, B, pool) for s in shapes for pool in (FP32, BF16) for B in VERIFY_BATCHES]
    cases += [apply_conv(s, 1, T) for s in shapes for T in CONV_LENGTHS]
    cases += [op(s, 1, T) for op in (conv_backward, apply_conv_backward) for s in shapes for T in CONV_LENGTHS]
    cases += [norm(op, s, N) for op in floors.NORM_TENSORS for s in shapes for N in NORM_TOKENS]
    cases += [swiglu(s, rows) for s in shapes if s.F for rows in POINTWISE_ROWS]
    cases += [delta_gates(s, tokens) for s in shapes for tokens in POINTWISE_ROWS]
    cases += [norm_backward(op, s, N) for op in floors.NORM_BACKWARD_TENSORS for s in shapes for N in TRAINING_TOKENS]
    cases += [swiglu_backward(s, rows) for s in shapes if s.F for rows in TRAINING_TOKENS]
    cases += [delta_gates_backward(s, tokens) for s in shapes for tokens in TRAINING_TOKENS]
    cases += [jet_block_step(s, N) for s in shapes if s.H == s.Hk for N in BLOCK_STEP_ROWS]
    return cases + [attention_step(s, N, L) for s in shapes if s.A for N, L in ATTENTION_CACHES]


def small(shape: Shape) -> list[Case]:
    """Every op once or twice, with tails, at a size that a simulator or a sanitiser finishes."""
    return [
        *(recurrent(shape, B, pool, T) for pool in (FP32, BF16) for B, T in ((3, 1), (2, 3))),
        *(op(shape, 2, pool) for op in (verify, commit) for pool in (FP32, BF16)),
        chunk(shape, 1, 130),
        chunk_backward(shape, 1, 130),
        *(recurrent(shape, 3, pool, v_first=True) for pool in (FP32, BF16)),
        *(prefill(shape, 3, 70, v_first) for v_first in (False, True)),
        conv(shape, 1, 130),
        conv_step(shape, 5),
        *([attention_step(shape, 3, 70)] if shape.A else []),
        *([jet_block_step(shape, 3)] if shape.H == shape.Hk else []),
        apply_conv(shape, 2, 67),
        conv_backward(shape, 1, 130),
        apply_conv_backward(shape, 2, 67),
        *(norm(op, shape, 67) for op in floors.NORM_TENSORS),
        *(norm_backward(op, shape, 67) for op in floors.NORM_BACKWARD_TENSORS),
        *([swiglu(shape, 3), swiglu_backward(shape, 3)] if shape.F else []),
        delta_gates(shape, 70),
        delta_gates_backward(shape, 70),
    ]


# Calls


def exists(op: str) -> bool:
    """Whether the op is defined and the compiled library implements it."""
    return hasattr(torch.ops.jet, op) and torch._C._dispatch_has_kernel_for_dispatch_key(f"jet::{op}", "CPU")


def function(op: str, namespace: str = "jet") -> Callable:
    return getattr(getattr(torch.ops, namespace), op)


def plain_function(op: str) -> Callable:
    """The op in plain PyTorch, whatever could serve it."""
    from jetkernels._library import PLAIN_ASKED

    return lambda *args: function(op, "jet_plain")(*args, PLAIN_ASKED)


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
        return _named(op, plain_function(op)(*wide), wide)


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
