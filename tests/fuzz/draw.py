"""A case from its number: sizes, values, layouts. Nothing else decides what is drawn but the op and what the backend
takes.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from support.arguments import (
    POOL_OPS,
    SEQUENCE_OPS,
    ApplyInputs,
    CommitCall,
    ConvInputs,
    DeltaInputs,
    PrefillCall,
    RecurrentCall,
    StepCall,
    accumulator,
    results_of,
)
from support.layouts import LAYOUTS, laid_out
from support.prefill_properties import possible_marks, read_rows
from support.shapes import LENGTHS
from torch import Tensor

OPS = (*SEQUENCE_OPS, *POOL_OPS, "prefill_gated_delta_rule")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DECADES = {F64: 6.0, F32: 4.0, BF16: 4.0, F16: 0.5}  # how far magnitudes go, so that results stay within the dtype
WORK = 2_000_000  # multiply-adds of the recurrence in one case: what keeps a case in the milliseconds


class Case(NamedTuple):
    number: int
    op: str
    dtype: torch.dtype
    inputs: NamedTuple
    grads: tuple[Tensor, Tensor | None] | None  # cotangents of (output, state); None: the op has no backward
    accepted: tuple[int, ...]  # of verify's tokens
    threads: int
    choice: random.Random  # goes on with what the checks draw
    what: str


class Draw(random.Random):
    """``kernel``: only what the Hopper kernels take."""

    def __init__(self, seed: str, kernel: bool):
        super().__init__(seed)
        self.kernel = kernel
        self.words: list[str] = []
        self.torch = torch.Generator().manual_seed(self.getrandbits(62))

    def chance(self, p: float) -> bool:
        return self.random() < p

    def named(self, name: str, *options):
        """One of ``options``, which goes into the words that describe the case."""
        value = self.choice(options)
        self.words.append(f"{name}={value}")
        return value

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=self.torch)

    def uniform01(self, *shape: int) -> Tensor:
        return torch.rand(*shape, dtype=F64, generator=self.torch)

    def magnitude(self, dtype: torch.dtype) -> float:
        return 10 ** self.uniform(-DECADES[dtype], DECADES[dtype]) if self.chance(0.3) else 1.0

    def length(self, most: int) -> int:
        drawn = (
            self.randint(0, 20)
            if self.chance(0.6)
            else self.choice(LENGTHS)
            if self.chance(0.75)
            else self.randint(0, 300)
        )
        return min(drawn, most)

    def head_dim(self, key: bool) -> int:
        if self.kernel:
            return (
                self.choice((64, 96, 128, 192, 256))
                if key
                else 16 * self.choice((self.randint(1, 4), self.randint(5, 9)))
            )
        common = self.choice((16, 32, 64, 96, 128, 256))
        return self.choices((self.randint(1, 20), common, self.randint(1, 140)), (5, 2, 1))[0]

    def channels(self) -> int:
        drawn = self.randint(1, 40) if self.chance(0.7) else self.randint(1, 400)
        return 8 * (drawn // 8 + 1) if self.kernel else drawn

    def index_dtype(self) -> torch.dtype:
        return self.choice((torch.int32, torch.int64))

    def layout(self, t: Tensor | None) -> Tensor | None:
        """The values of ``t`` behind other strides, or some of them repeated by a stride of 0."""
        if t is None or self.chance(0.5):
            return t
        repeated = [d for d in range(t.dim() - 1) if t.shape[d] > 1]
        if t.is_floating_point() and repeated and self.chance(0.15):
            return t.narrow(self.choice(repeated), 0, 1).expand(t.shape)
        return laid_out(t, self.choice(LAYOUTS))

    def offsets(self, most: int) -> Tensor:
        cu = [0]
        for _ in range(self.choice((0, 1, 1, 2, 3, 4, 6))):
            cu.append(cu[-1] + (0 if self.chance(0.25) else self.length(most)))
        return torch.tensor(cu, dtype=self.index_dtype())


def case_of(number: int, op: str | None = None, kernel: bool = False) -> Case:
    """Case ``number``, of ``op`` or of one that is drawn. ``kernel``: of what the Hopper kernels take."""
    choice = random.Random(f"case {number}")
    drawn = choice.choice(OPS)
    op = op or drawn
    draw = Draw(f"{op} {number}", kernel)
    grads, accepted = None, ()
    # commit takes fp32 or fp64 whatever the model's dtype; the kernels take no fp64, those over sequences 16 bits only
    few = (
        (BF16, F16)
        if op in (*SEQUENCE_OPS, "dynamic_conv_step", "prefill_gated_delta_rule")
        else (F32,)
        if op.endswith("commit")
        else (F32, BF16, F16)
    )
    dtype = draw.choice(few) if kernel else draw.choice((F64, F32) if op.endswith("commit") else (F64, F32, BF16, F16))
    if op == "chunk_gated_delta_rule":
        inputs = _delta(draw, dtype)
    elif op in SEQUENCE_OPS:
        inputs = _conv(draw, dtype, op)
    elif op == "dynamic_conv_step":
        inputs = _step(draw, dtype)
    elif op == "recurrent_gated_delta_rule_commit":
        inputs = _commit(draw, dtype)
    elif op == "prefill_gated_delta_rule":
        inputs = _prefill(draw, dtype)
    else:
        inputs = _recurrent(draw, dtype)
        T = inputs.v.shape[1]
        accepted = tuple(draw.choice((0, T, draw.randint(0, T))) for _ in range(inputs.v.shape[0]))
    if op in SEQUENCE_OPS:
        grads = _cotangents(draw, inputs)
    shapes = [f"{n}{list(t.shape)}" for n, t in inputs._asdict().items() if isinstance(t, Tensor)]
    return Case(
        number, op, dtype, inputs, grads, accepted, draw.choice((1, 2, 4)), choice, " ".join((*shapes, *draw.words))
    )


# ---- the delta rule


class _Sizes(NamedTuple):
    B: int
    T: int
    Hk: int
    H: int
    K: int
    V: int


def _delta_sizes(draw: Draw, B: int, T: int, l2norm: bool) -> _Sizes:
    """Few enough heads and columns that the token loop stays short."""
    while True:
        Hk, group = draw.choice((1, 1, 2, 3)), draw.choice((1, 1, 2, 3))
        K, V = draw.head_dim(key=True), draw.head_dim(key=False)
        if l2norm:
            # A normalised vector of one or two elements has a direction that it can hardly leave: its true gradient is
            # all cancellation.
            K = max(K, 3)
        if B * T * Hk * group * K * V <= (4 * WORK if draw.kernel else WORK) or Hk * group * K * V <= 8192:
            return _Sizes(B, T, Hk, Hk * group, K, V)


def _gates(draw: Draw, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    g, beta = -0.5 * draw.uniform01(*shape), draw.uniform01(*shape)
    kind = draw.named(
        "g",
        "plain",
        "plain",
        "small",
        "strong",
        0.0,
        -1e-3,
        -1.0,
        -20.0,
        -50.0,
        -math.inf,
        "some -inf",
        "some -1e3",
        "some lowest",
    )
    if isinstance(kind, float):
        g.fill_(kind)
    elif kind == "small":
        g *= 0.02
    elif kind == "strong":
        g = -16 * torch.nn.functional.softplus(draw.normal(*shape) - 1)
    elif kind.startswith("some"):
        value = {"some -inf": -math.inf, "some -1e3": -1e3, "some lowest": -torch.finfo(F32).max}[kind]
        g[draw.uniform01(*shape) < draw.choice((0.02, 0.2))] = value
    kind = draw.named("beta", "plain", "plain", 0.0, 1.0, "some zero")
    if isinstance(kind, float):
        beta.fill_(kind)
    elif kind == "some zero":
        beta[draw.uniform01(*shape) < 0.3] = 0
    return g, beta


def _delta_tokens(draw: Draw, s: _Sizes, dtype: torch.dtype, l2norm: bool) -> tuple[Tensor, ...]:
    """q, k, v, g, beta. Without l2norm |k| <= 1: beyond sqrt(2) the recurrence itself grows without bound."""
    q, k, v = draw.normal(s.B, s.T, s.Hk, s.K), draw.normal(s.B, s.T, s.Hk, s.K), draw.normal(s.B, s.T, s.H, s.V)
    keys = draw.named("keys", "plain", "plain", "plain", "identical", "alternating", "similar", "zero", "all zero")
    if keys in ("identical", "alternating", "similar") and s.T:
        k = k[:, :1] + (draw.choice((0.01, 0.3)) * k if keys == "similar" else torch.zeros_like(k))
        if keys == "alternating":
            k[:, 1::2] *= -1
    if not l2norm:
        k = k / k.norm(dim=-1, keepdim=True).clamp_min(1e-9) * draw.uniform(0.3, 1)
    if keys == "zero":
        k[:, ::5], q[:, ::3] = 0, 0
    elif keys == "all zero":
        k.zero_()
    g, beta = _gates(draw, (s.B, s.T, s.H))
    q, v = q * draw.magnitude(dtype), v * draw.magnitude(dtype)
    if l2norm and keys not in ("zero", "all zero"):
        k = k * draw.magnitude(dtype)
    gates = [accumulator(dtype)] * 2
    if draw.chance(0.2):
        gates = [draw.choice((F32, BF16, F16) if draw.kernel else (F64, F32, BF16)) for _ in "gb"]
    return tuple(draw.layout(t.to(d)) for t, d in ((q, dtype), (k, dtype), (v, dtype), (g, gates[0]), (beta, gates[1])))


def _scale(draw: Draw, K: int) -> float:
    return K**-0.5 if draw.chance(0.6) else draw.uniform(0.05, 2)


def _delta(draw: Draw, dtype: torch.dtype) -> DeltaInputs:
    l2norm, cu = draw.named("l2norm", True, False), None
    if draw.chance(0.4):
        cu = draw.offsets(130)
        B, T = 1, int(cu[-1])
    else:
        B, T = draw.choice((0, 1, 1, 1, 1, 2, 2, 3, 4)), draw.length(300)
    s = _delta_sizes(draw, B, T, l2norm)
    tokens = _delta_tokens(draw, s, dtype, l2norm)
    N = B if cu is None else len(cu) - 1
    S = None
    if draw.chance(0.7):
        S = draw.layout((draw.normal(N, s.H, s.K, s.V) * draw.magnitude(dtype)).to(accumulator(dtype)))
    return DeltaInputs(*tokens, S, draw.layout(cu), _scale(draw, s.K), l2norm)


def _pool(draw: Draw, dtype: torch.dtype, shape: Sequence[int], N: int) -> tuple[Tensor, Tensor | None]:
    """A pool of at least N rows, and which row each sequence has. Rows that nobody has may hold NaN."""
    P = N + draw.randint(0, 3)
    rows = None
    if draw.chance(0.75):
        named = [
            row if draw.chance(0.8) else draw.choice((-1, -2, -P - 1, -(2**31))) for row in draw.sample(range(P), N)
        ]
        rows = torch.tensor(named, dtype=draw.index_dtype())
    pool = (draw.normal(P, *shape) * draw.magnitude(dtype)).to(dtype)
    if draw.chance(0.5):
        used = range(N) if rows is None else rows.tolist()
        pool[[row for row in range(P) if row not in used]] = math.nan
    return pool, draw.layout(rows)


def _strided_pool(draw: Draw, pool: Tensor) -> Tensor:
    """In any layout; for the kernels in one whose rows of a state start at a multiple of 16 bytes. What lies between is
    NaN.
    """
    if draw.chance(0.5):
        return pool
    if not draw.kernel:
        return laid_out(pool, draw.choice(LAYOUTS))
    P, H, K, V = pool.shape
    unit = 16 // pool.element_size()
    wide = torch.full((P + 1, K, H + 1, V + 2 * unit), math.nan, dtype=pool.dtype)
    return wide.permute(0, 2, 1, 3)[1:, :H, :, unit : unit + V].copy_(pool)


def _recurrent_sizes(draw: Draw, l2norm: bool) -> _Sizes:
    N = draw.choice((0, 1, 1, 2, 2, 3, 4, 6, draw.randint(1, 40)))
    T = draw.choice((1, 1, 1, 1, 2, 3, 4, 5, 7, 8, 9, 11, draw.randint(1, 40)))
    return _delta_sizes(draw, N, T, l2norm)


def _state_dtype(draw: Draw, dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else draw.choice((F32, F32, BF16))


def _recurrent(draw: Draw, dtype: torch.dtype) -> RecurrentCall:
    l2norm = draw.named("l2norm", True, False)
    s = _recurrent_sizes(draw, l2norm)
    tokens = _delta_tokens(draw, s, dtype, l2norm)
    pool, rows = _pool(draw, _state_dtype(draw, dtype), (s.H, s.K, s.V), s.B)
    return RecurrentCall(*tokens, _strided_pool(draw, pool), rows, _scale(draw, s.K), l2norm)


def _commit(draw: Draw, dtype: torch.dtype) -> CommitCall:
    s = _recurrent_sizes(draw, False)
    keys, updates = (
        draw.normal(s.B, s.T, s.Hk, s.K) * s.K**-0.5,
        draw.normal(s.B, s.T, s.H, s.V) * draw.magnitude(dtype),
    )
    g, _ = _gates(draw, (s.B, s.T, s.H))
    number = torch.tensor([draw.choice((0, s.T, draw.randint(0, s.T))) for _ in range(s.B)], dtype=draw.index_dtype())
    pool, rows = _pool(draw, _state_dtype(draw, dtype), (s.H, s.K, s.V), s.B)
    g = draw.layout(g.to(accumulator(dtype)))
    return CommitCall(keys.to(dtype), updates.to(dtype), g, draw.layout(number), _strided_pool(draw, pool), rows)


def _marks(draw: Draw, cu: Tensor) -> list[int]:
    """Numbers of tokens behind which states are kept, in any order."""
    kind = draw.named("marks", "none", "some", "some", "all")
    tokens = [t for t in possible_marks(cu.tolist()) if kind == "all" or (kind == "some" and draw.chance(0.5))]
    draw.shuffle(tokens)
    return tokens


def _prefill(draw: Draw, dtype: torch.dtype) -> PrefillCall:
    l2norm, cu = draw.named("l2norm", True, False), draw.offsets(300)
    s = _delta_sizes(draw, 1, int(cu[-1]), l2norm)
    tokens = _delta_tokens(draw, s, dtype, l2norm)
    N, marks = len(cu) - 1, _marks(draw, cu)
    M = len(marks)
    pool, rows = _pool(draw, _state_dtype(draw, dtype), (s.H, s.K, s.V), N + M)
    mark_rows = torch.arange(N, N + M) if rows is None else rows[N:]
    if rows is None and draw.chance(0.3):
        mark_rows = torch.where(draw.uniform01(M) < 0.5, mark_rows, -1)
    mark_tokens = torch.tensor(marks, dtype=draw.index_dtype())
    if draw.chance(0.2):  # without a row a mark may be any number, also one that is named again
        mark_tokens = torch.cat([mark_tokens, mark_tokens.new_tensor([draw.choice((0, -1, *marks))])])
        mark_rows = torch.cat([mark_rows, mark_rows.new_tensor([-1])])
    known = (draw.uniform01(N) < draw.choice((0.0, 0.5, 0.8))) if draw.chance(0.7) else None
    given = M > 0 or draw.chance(0.5)
    call = PrefillCall(
        *tokens,
        pool,
        rows if rows is None else rows[:N],
        draw.layout(cu),
        draw.layout(known),
        draw.layout(mark_tokens) if given else None,
        draw.layout(mark_rows) if given else None,
        _scale(draw, s.K),
        l2norm,
    )
    if draw.chance(0.5):
        read = read_rows(call)
        pool[[row for row in range(len(pool)) if row not in read]] = math.nan
    # The kernels take a pool of any strides.
    pool = laid_out(pool, draw.choice(LAYOUTS)) if draw.chance(0.6) else laid_out(pool.mT, draw.choice(LAYOUTS)).mT
    return call._replace(state=pool)


# ---- the convolution


def _generator(draw: Draw, dtype: torch.dtype, D: int, R: int, W: int) -> tuple[Tensor, Tensor | None]:
    weight = (draw.normal(D * W, R) * R**-0.5 * draw.magnitude(dtype)).to(dtype)
    bias = (draw.normal(D * W) * draw.magnitude(dtype)).to(dtype) if draw.chance(0.7) else None
    return draw.layout(weight), draw.layout(bias)


def _conv(draw: Draw, dtype: torch.dtype, op: str) -> ConvInputs | ApplyInputs:
    cu = draw.offsets(130) if draw.chance(0.4) else None
    B, T = (draw.choice((0, 1, 1, 1, 1, 2, 2, 3, 4)), draw.length(300)) if cu is None else (1, int(cu[-1]))
    D, R, W, silu = draw.channels(), draw.channels(), draw.choice((2, 3, 4, 4)), draw.named("silu", True, False)
    N = B if cu is None else len(cu) - 1
    x = draw.layout((draw.normal(B, T, D) * draw.magnitude(dtype)).to(dtype))
    state = draw.layout((draw.normal(N, D, W - 1) * draw.magnitude(dtype)).to(dtype)) if draw.chance(0.7) else None
    if op == "apply_dynamic_conv":
        kernels = draw.layout((draw.normal(B, T, D, W) * draw.magnitude(dtype)).to(dtype))
        return ApplyInputs(x, kernels, state, draw.layout(cu), silu)
    hidden = draw.layout((draw.normal(B, T, R) * draw.magnitude(dtype)).to(dtype))
    return ConvInputs(x, hidden, *_generator(draw, dtype, D, R, W), state, draw.layout(cu), silu)


def _step(draw: Draw, dtype: torch.dtype) -> StepCall:
    N = draw.choice((0, 1, 1, 2, 3, 8, draw.randint(1, 70), draw.randint(1, 150)))
    D, R, W, silu = draw.channels(), draw.channels(), draw.choice((2, 3, 4, 4)), draw.named("silu", True, False)
    x, hidden = (draw.layout((draw.normal(N, size) * draw.magnitude(dtype)).to(dtype)) for size in (D, R))
    weight, bias = _generator(draw, dtype, D, R, W)
    pool, rows = _pool(draw, dtype, (D, W - 1), N)
    if not draw.kernel:
        pool = _strided_pool(draw, pool)
    return StepCall(x, hidden, weight, bias, pool, rows, silu)


# ---- cotangents


def _cotangents(draw: Draw, inputs: NamedTuple) -> tuple[Tensor, Tensor | None]:
    (shape, dtype), (state_shape, state_dtype) = results_of(inputs)
    grad = (draw.normal(*shape) * draw.magnitude(dtype)).to(dtype)
    which = draw.named("cotangents", "both", "both", "both", "output", "state")
    state = (draw.normal(*state_shape) * draw.magnitude(dtype)).to(state_dtype) if which != "output" else None
    return draw.layout(torch.zeros_like(grad) if which == "state" else grad), draw.layout(state)
