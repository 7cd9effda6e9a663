"""The arguments of each op: a named tuple with the names of its schema, and one builder.

``Inputs`` are those of an op over whole sequences, a ``Call`` is one of an op on a pool of states; its ``pool`` is the
argument that the op calls state or conv_state.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from support.shapes import AttentionShape, ConvShape, DeltaShape
from torch import Tensor

F32, F64 = torch.float32, torch.float64
# Arguments [B, T, ...] or [N, ...]; the others are states and weights.
TOKENS = ("q", "k", "v", "g", "beta", "x", "hidden", "kernels")


class DeltaInputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    scale: float
    l2norm_qk: bool


class ConvInputs(NamedTuple):
    x: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    conv_state: Tensor | None
    cu_seqlens: Tensor | None
    silu: bool


class ApplyInputs(NamedTuple):
    x: Tensor
    kernels: Tensor
    conv_state: Tensor | None
    cu_seqlens: Tensor | None
    silu: bool


class NormInputs(NamedTuple):
    x: Tensor
    weight: Tensor
    eps: float


class AddNormInputs(NamedTuple):
    x: Tensor
    residual: Tensor
    weight: Tensor
    eps: float


class GatedNormInputs(NamedTuple):
    x: Tensor
    gate: Tensor
    weight: Tensor
    eps: float


class SwigluInputs(NamedTuple):
    gate: Tensor
    up: Tensor


class GatesInputs(NamedTuple):
    a: Tensor
    b: Tensor
    A_log: Tensor
    dt_bias: Tensor


class LinearInputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None


class QuantizedLinearInputs(NamedTuple):
    x: Tensor
    weight: Tensor
    scale: Tensor
    bias: Tensor | None


class RecurrentCall(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor
    state_indices: Tensor | None
    scale: float
    l2norm_qk: bool

    @property
    def pool(self) -> Tensor:
        return self.state


class VerifyCall(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor
    state_indices: Tensor | None
    keys: Tensor
    updates: Tensor
    scale: float
    l2norm_qk: bool

    @property
    def pool(self) -> Tensor:
        return self.state


class CommitCall(NamedTuple):
    keys: Tensor
    updates: Tensor
    g: Tensor
    num_accepted: Tensor
    state: Tensor
    state_indices: Tensor | None

    @property
    def pool(self) -> Tensor:
        return self.state


class PrefillCall(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    state: Tensor
    state_indices: Tensor | None
    cu_seqlens: Tensor
    has_initial_state: Tensor | None
    mark_tokens: Tensor | None
    mark_indices: Tensor | None
    scale: float
    l2norm_qk: bool

    @property
    def pool(self) -> Tensor:
        return self.state


class StepCall(NamedTuple):
    x: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    conv_state: Tensor
    state_indices: Tensor | None
    silu: bool

    @property
    def pool(self) -> Tensor:
        return self.conv_state


class BlockStepCall(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor
    a: Tensor
    b: Tensor
    gate: Tensor
    weight: Tensor
    bias: Tensor | None
    A_log: Tensor
    dt_bias: Tensor
    norm_weight: Tensor
    conv_state: Tensor
    state: Tensor
    state_indices: Tensor | None
    scale: float
    eps: float


class AttentionCall(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    key: Tensor
    value: Tensor
    lengths: Tensor
    scale: float


SEQUENCE_OPS: dict[str, type] = {
    "chunk_gated_delta_rule": DeltaInputs,
    "dynamic_conv": ConvInputs,
    "apply_dynamic_conv": ApplyInputs,
}
POOL_OPS: dict[str, type] = {
    "recurrent_gated_delta_rule": RecurrentCall,
    "dynamic_conv_step": StepCall,
    "recurrent_gated_delta_rule_verify": VerifyCall,
    "recurrent_gated_delta_rule_commit": CommitCall,
}
# The last two write to two tensors; the first has sequences of many lengths.
IN_PLACE_OPS: dict[str, type] = POOL_OPS | {
    "prefill_gated_delta_rule": PrefillCall,
    "jet_block_step": BlockStepCall,
    "attention_step": AttentionCall,
}
NORM_OPS: dict[str, type] = {
    "rms_norm": NormInputs,
    "add_rms_norm": AddNormInputs,
    "gated_rms_norm": GatedNormInputs,
}
POINTWISE_OPS: dict[str, type] = {"swiglu": SwigluInputs, "delta_gates": GatesInputs}
LINEAR_OPS: dict[str, type] = {
    "linear": LinearInputs,
    "linear_int8": QuantizedLinearInputs,
    "linear_int4": QuantizedLinearInputs,
}
DIFFERENTIABLE_OPS = SEQUENCE_OPS | NORM_OPS | POINTWISE_OPS
ALL_OPS = DIFFERENTIABLE_OPS | IN_PLACE_OPS | LINEAR_OPS


def op_of(arguments: NamedTuple) -> str:
    return next(op for op, kind in (SEQUENCE_OPS | IN_PLACE_OPS).items() if isinstance(arguments, kind))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def floating(arguments: NamedTuple) -> dict[str, Tensor]:
    return {name: t for name, t in arguments._asdict().items() if isinstance(t, Tensor) and t.is_floating_point()}


def tensor_names(arguments: NamedTuple) -> list[str]:
    return [name for name, t in arguments._asdict().items() if isinstance(t, Tensor)]


# ---- ops over whole sequences


def _offsets(cu_seqlens: tuple[int, ...] | None) -> Tensor | None:
    return None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)


def delta_inputs(shape: DeltaShape, dtype: torch.dtype = F32, seed: int = 0) -> DeltaInputs:
    """Ordinary values: decays of a few percent to a half per token, beta in (0, 1)."""
    torch.manual_seed(seed)
    B, T, H, acc = shape.B, shape.T, shape.H, accumulator(dtype)
    q, k = (torch.randn(B, T, shape.Hk, shape.K, dtype=F64) for _ in "qk")
    if not shape.l2norm:
        k = k * shape.K**-0.5  # |k| near 1, or the recurrence grows without bound
    v = torch.randn(B, T, H, shape.V, dtype=F64)
    g = -torch.rand(B, T, H, dtype=F64) * 0.5
    beta = torch.rand(B, T, H, dtype=F64)
    S = torch.randn(shape.N, H, shape.K, shape.V, dtype=F64) if shape.state else None
    return DeltaInputs(
        q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        g.to(acc),
        beta.to(acc),
        None if S is None else S.to(acc),
        _offsets(shape.cu_seqlens),
        shape.K**-0.5,
        shape.l2norm,
    )


def conv_inputs(shape: ConvShape, dtype: torch.dtype = F32, seed: int = 0) -> ConvInputs:
    torch.manual_seed(seed)
    x = torch.randn(shape.B, shape.T, shape.D, dtype=F64)
    hidden = torch.randn(shape.B, shape.T, shape.R, dtype=F64)
    weight = torch.randn(shape.D * shape.W, shape.R, dtype=F64) * shape.R**-0.5
    bias = torch.randn(shape.D * shape.W, dtype=F64).to(dtype) if shape.bias else None
    state = torch.randn(shape.N, shape.D, shape.W - 1, dtype=F64).to(dtype) if shape.state else None
    return ConvInputs(
        x.to(dtype), hidden.to(dtype), weight.to(dtype), bias, state, _offsets(shape.cu_seqlens), shape.silu
    )


def apply_inputs(shape: ConvShape, dtype: torch.dtype = F32, seed: int = 0) -> ApplyInputs:
    x, _, _, _, state, cu_seqlens, silu = conv_inputs(shape, dtype, seed)
    kernels = torch.randn(shape.B, shape.T, shape.D, shape.W, dtype=F64).to(dtype)
    return ApplyInputs(x, kernels, state, cu_seqlens, silu)


def results_of(inputs: NamedTuple) -> tuple[tuple[Sequence[int], torch.dtype], ...]:
    """Shape and dtype of each result of a differentiable op; of one over sequences o or y, and the state."""
    if isinstance(inputs, GatesInputs):
        return ((inputs.a.shape, accumulator(inputs.a.dtype)),) * 2
    if isinstance(inputs, (NormInputs, AddNormInputs, GatedNormInputs, SwigluInputs)):
        return ((inputs[0].shape, inputs[0].dtype),) * (2 if isinstance(inputs, AddNormInputs) else 1)
    like = inputs.v if isinstance(inputs, DeltaInputs) else inputs.x
    N = inputs[0].shape[0] if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
    if isinstance(inputs, DeltaInputs):
        state, dtype = (N, like.shape[2], inputs.q.shape[3], like.shape[3]), accumulator(like.dtype)
    else:
        W = inputs.weight.shape[0] // like.shape[2] if isinstance(inputs, ConvInputs) else inputs.kernels.shape[3]
        state, dtype = (N, like.shape[2], W - 1), like.dtype
    return (like.shape, like.dtype), (state, dtype)


def cotangents(inputs: NamedTuple, seed: int = 1) -> tuple[Tensor, ...]:
    """Gradients of the results of a differentiable op."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=F64).to(dtype) for shape, dtype in results_of(inputs))


# ---- norms


def norm_inputs(
    op: str,
    *sizes: int,
    dtype: torch.dtype = F32,
    weight_dtype: torch.dtype | None = None,
    eps: float = 1e-5,
    seed: int = 0,
) -> NamedTuple:
    """Of tensors [*sizes]; the weight has the dtype of the others unless ``weight_dtype`` says otherwise."""
    generator = torch.Generator().manual_seed(seed)
    x, other = (2 * torch.randn(sizes, generator=generator, dtype=F64) for _ in range(2))
    weight = torch.randn(sizes[-1], generator=generator, dtype=F64).to(weight_dtype or dtype)
    tensors = (x.to(dtype),) if op == "rms_norm" else (x.to(dtype), other.to(dtype))
    return NORM_OPS[op](*tensors, weight, eps)


# ---- pointwise ops


def swiglu_inputs(*sizes: int, dtype: torch.dtype = F32, seed: int = 0) -> SwigluInputs:
    """Of tensors [*sizes], in which some silu is small and some is large."""
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(sizes, generator=generator, dtype=F64) for _ in range(2))
    return SwigluInputs((4 * gate).to(dtype), up.to(dtype))


def gates_inputs(*sizes: int, dtype: torch.dtype = F32, seed: int = 0) -> GatesInputs:
    """Of tensors [*sizes]; decays from almost none to all."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(sizes, generator=generator, dtype=F64) for _ in range(2))
    A_log, dt_bias = (torch.randn(sizes[-1], generator=generator, dtype=F64) for _ in range(2))
    real = accumulator(dtype)
    return GatesInputs((4 * a).to(dtype), (4 * b).to(dtype), A_log.to(real), dt_bias.to(real))


# ---- products with a weight


def linear_inputs(
    op: str,
    *sizes: int,
    P: int,
    G: int = 1,
    dtype: torch.dtype = F32,
    bias: bool = True,
    seed: int = 0,
) -> NamedTuple:
    """Of x [*sizes], whose C columns have ``G`` groups of the quantised ops (of an even size for linear_int4)."""
    torch.manual_seed(seed)
    C = sizes[-1]
    x = torch.randn(sizes, dtype=F64).to(dtype)
    b = torch.randn(P, dtype=F64).to(dtype) if bias else None
    if op == "linear":
        return LinearInputs(x, torch.randn(P, C, dtype=F64).to(dtype), b)
    if op == "linear_int8":
        weight = torch.randint(-128, 128, (P, C), dtype=torch.int8)
    else:
        weight = torch.randint(0, 256, (P, C // 2), dtype=torch.uint8)
    return QuantizedLinearInputs(x, weight, torch.rand(P, G) + 0.1, b)


# ---- ops on a pool of states


def with_rows(call: NamedTuple, rows: Sequence[int] | None, dtype: torch.dtype = torch.int64) -> NamedTuple:
    return call._replace(state_indices=None if rows is None else torch.tensor(rows, dtype=dtype))


def with_pool(call: NamedTuple, pool: Tensor) -> NamedTuple:
    return call._replace(**{"conv_state" if isinstance(call, StepCall) else "state": pool})


def recurrent_call(
    shape: DeltaShape,
    dtype: torch.dtype = F32,
    state_dtype: torch.dtype | None = None,
    rows: Sequence[int] | None = None,
    P: int | None = None,
    seed: int = 0,
) -> RecurrentCall:
    """With a pool of ``P`` rows, two more than there are sequences where P is not given."""
    *tokens, _, _, scale, l2norm = delta_inputs(shape, dtype, seed)
    P = shape.B + 2 if P is None else P
    state = torch.randn(P, shape.H, shape.K, shape.V, dtype=F64).to(state_dtype or accumulator(dtype))
    return with_rows(RecurrentCall(*tokens, state, None, scale, l2norm), rows)


def verify_call(call: RecurrentCall, fill: float = 0.0) -> VerifyCall:
    """The same with the buffers that verify writes, which hold ``fill``."""
    keys, updates = (torch.full(t.shape, fill, dtype=accumulator(t.dtype)) for t in (call.k, call.v))
    return VerifyCall(*call[:7], keys, updates, *call[7:])


def commit_call(call: RecurrentCall, accepted: Sequence[int], dtype: torch.dtype = torch.int64) -> CommitCall:
    """Keys of norm 1 and updates as large as the values of ``call``."""
    high = accumulator(call.q.dtype)
    keys = torch.nn.functional.normalize(call.k.to(high), dim=-1)
    number = torch.tensor(accepted, dtype=dtype)
    return CommitCall(keys, call.v.to(high), call.g, number, call.state, call.state_indices)


def prefill_call(
    shape: DeltaShape,
    dtype: torch.dtype = F32,
    state_dtype: torch.dtype | None = None,
    rows: Sequence[int] | None = None,
    goes_on: Sequence[bool] | None = None,
    marks: dict[int, int] | None = None,
    seed: int = 0,
) -> PrefillCall:
    """Of packed sequences, with a pool of two rows more than there are sequences and marks.

    Args:
        shape: its ``cu_seqlens`` are the sequences.
        dtype: of q, k and v.
        state_dtype: of the pool.
        rows: of the pool, one per sequence.
        goes_on: has_initial_state.
        marks: {number of tokens: row of the pool}.
        seed: of the values.
    """
    *tokens, _, cu_seqlens, scale, l2norm = delta_inputs(shape, dtype, seed)
    P = shape.N + 2 + len(marks or ())
    state = torch.randn(P, shape.H, shape.K, shape.V, dtype=F64).to(state_dtype or accumulator(dtype))
    known = None if goes_on is None else torch.tensor(goes_on, dtype=torch.bool)
    at = (None, None) if marks is None else tuple(torch.tensor(list(x)) for x in (marks.keys(), marks.values()))
    return with_rows(PrefillCall(*tokens, state, None, cu_seqlens, known, *at, scale, l2norm), rows)


def some_prefixes(shape: DeltaShape) -> list[int]:
    """How many tokens of a draft each sequence accepts: all, none, half, all, ..."""
    return [(shape.T, 0, shape.T // 2)[n % 3] for n in range(shape.B)]


def step_call(
    shape: ConvShape,
    dtype: torch.dtype = F32,
    rows: Sequence[int] | None = None,
    P: int | None = None,
    seed: int = 0,
) -> StepCall:
    """One token for each of shape.B sequences."""
    x, hidden, weight, bias, _, _, silu = conv_inputs(shape._replace(T=1, cu_seqlens=None), dtype, seed)
    P = shape.B + 2 if P is None else P
    pool = torch.randn(P, shape.D, shape.W - 1, dtype=F64).to(dtype)
    return with_rows(StepCall(x[:, 0], hidden[:, 0], weight, bias, pool, None, silu), rows)


def block_step_call(
    N: int = 3,
    H: int = 2,
    K: int = 8,
    V: int = 12,
    R: int = 5,
    W: int = 4,
    dtype: torch.dtype = F32,
    state_dtype: torch.dtype | None = None,
    rows: Sequence[int] | None = None,
    P: int | None = None,
    seed: int = 0,
) -> BlockStepCall:
    """With pools of ``P`` rows, two more than there are sequences where P is not given; gates as in a new JetBlock."""
    torch.manual_seed(seed)
    P, D = N + 2 if P is None else P, H * V

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, dtype=F64) * scale).to(dtype)

    call = BlockStepCall(
        q=normal(N, H, K),
        k=normal(N, H, K),
        v=normal(N, D),
        hidden=normal(N, R),
        a=normal(N, H),
        b=normal(N, H),
        gate=normal(N, H, V),
        weight=normal(D * W, R, scale=R**-0.5),
        bias=normal(D * W),
        A_log=torch.rand(H, dtype=F64).to(accumulator(dtype)),
        dt_bias=(torch.rand(H, dtype=F64) * 4 - 5).to(accumulator(dtype)),
        norm_weight=normal(V),
        conv_state=normal(P, D, W - 1),
        state=torch.randn(P, H, K, V, dtype=F64).to(state_dtype or accumulator(dtype)),
        state_indices=None,
        scale=K**-0.5,
        eps=1e-5,
    )
    return with_rows(call, rows)


# ---- attention over caches


def attention_call(shape: AttentionShape, dtype: torch.dtype = F32, seed: int = 0, dirty: bool = True) -> AttentionCall:
    """Ordinary values. ``dirty``: the slots that nothing may read hold NaN."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=F64).to(dtype)

    N, (_, lengths, H, Hkv, d, L) = len(shape.lengths), shape
    angles = torch.rand(N, d // 2, generator=generator) * 2 * math.pi
    angles = torch.cat((angles, angles), -1)
    key, value = randn(N, Hkv, L, d), randn(N, Hkv, L, d)
    if dirty:
        for n, length in enumerate(lengths):
            key[n, :, max(length, 0) :] = math.nan
            value[n, :, max(length, 0) :] = math.nan
    q, k, v = randn(N, H, d), randn(N, Hkv, d), randn(N, Hkv, d)
    return AttentionCall(
        q, k, v, angles.cos(), angles.sin(), key, value, torch.tensor(lengths, dtype=torch.int64), d**-0.5
    )


# ---- all of them

BUILDERS: dict[str, Callable[..., NamedTuple]] = {
    "chunk_gated_delta_rule": delta_inputs,
    "dynamic_conv": conv_inputs,
    "apply_dynamic_conv": apply_inputs,
}


def inputs_of(op: str, shape: DeltaShape | ConvShape, dtype: torch.dtype = F32, seed: int = 0) -> NamedTuple:
    """Of an op over whole sequences."""
    return BUILDERS[op](shape, dtype, seed)


def call_of(
    op: str,
    shape: DeltaShape | ConvShape,
    dtype: torch.dtype = F32,
    rows: Sequence[int] | None = None,
    seed: int = 0,
) -> NamedTuple:
    """Of an op on a pool; commit accepts `some_prefixes`."""
    if op == "dynamic_conv_step":
        return step_call(shape, dtype, rows, seed=seed)
    call = recurrent_call(shape, dtype, None, rows, seed=seed)
    if op == "recurrent_gated_delta_rule":
        return call
    if op == "recurrent_gated_delta_rule_verify":
        return verify_call(call)
    return commit_call(call, some_prefixes(shape))


def example(op: str, dtype: torch.dtype = F32, indexed: bool = True) -> NamedTuple:
    """A small valid call of any op. ``indexed``: with cu_seqlens, or with state_indices of which one is negative."""
    delta, conv = DeltaShape("", B=2, T=3, K=4, V=3), ConvShape("", B=2, T=3, D=4)
    if op in NORM_OPS:
        return norm_inputs(op, 2, 3, 4, dtype=dtype, weight_dtype=dtype if indexed else accumulator(dtype))
    if op in POINTWISE_OPS:
        return swiglu_inputs(2, 3, 4, dtype=dtype) if op == "swiglu" else gates_inputs(2, 3, 4, dtype=dtype)
    if op in LINEAR_OPS:
        return linear_inputs(op, *((2, 3) if indexed else (3,)), 8, P=5, G=2, dtype=dtype, bias=indexed)
    if op == "attention_step":
        lengths = (2, -1, 20) if indexed else (5, 0, 9)
        return attention_call(AttentionShape("", lengths, H=4, Hkv=2, d=4, L=6), dtype, dirty=False)
    if op in SEQUENCE_OPS:
        shape = delta if SEQUENCE_OPS[op] is DeltaInputs else conv
        return inputs_of(op, shape._replace(B=1, T=5, cu_seqlens=(0, 0, 2, 5)) if indexed else shape, dtype)
    if op == "prefill_gated_delta_rule":
        packed = delta._replace(B=1, T=72, cu_seqlens=(0, 67, 67, 72))
        more = {"rows": (2, -1, 0), "goes_on": (True, True, False), "marks": {64: 3, 72: 5}} if indexed else {}
        return prefill_call(packed, dtype, **more)
    if op == "jet_block_step":
        call = block_step_call(K=4, V=3, dtype=dtype, rows=(2, -1, 0) if indexed else None)
        return call if indexed else call._replace(bias=None)
    shape = conv._replace(bias=indexed) if op == "dynamic_conv_step" else delta
    return call_of(op, shape._replace(B=3), dtype, (2, -1, 0) if indexed else None)
