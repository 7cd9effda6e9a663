"""What the op tests share: inputs with a reason each, one table of tolerances, hypothesis strategies, the two
backends.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from jetkernels import ops  # noqa: F401  (registers torch.ops.jet)
from jetkernels.plain import apply_dynamic_conv as plain_apply_dynamic_conv
from jetkernels.plain import chunk_gated_delta_rule as plain_chunk_gated_delta_rule
from jetkernels.plain import dynamic_conv as plain_dynamic_conv
from jetkernels.plain import dynamic_conv_step as plain_dynamic_conv_step
from jetkernels.plain import recurrent_gated_delta_rule as plain_recurrent_gated_delta_rule
from jetkernels.plain import recurrent_gated_delta_rule_commit as plain_recurrent_gated_delta_rule_commit
from jetkernels.plain import recurrent_gated_delta_rule_verify as plain_recurrent_gated_delta_rule_verify
from reference.apply_dynamic_conv import apply_dynamic_conv
from reference.dynamic_conv import dynamic_conv
from reference.recurrent_gated_delta_rule import gated_delta_rule

# ---- tolerances: RMS(out - ref) / RMS(ref) against the fp64 reference on the same rounded inputs


class Tolerance(NamedTuple):
    output: float
    state: float
    gradient: float
    gate_gradient: float  # dg and dbeta


TOLERANCE = {
    torch.float64: Tolerance(1e-10, 1e-10, 1e-10, 1e-10),
    torch.float32: Tolerance(1e-5, 1e-5, 1e-5, 1e-5),
    torch.float16: Tolerance(1e-3, 1e-3, 2e-3, 5e-3),
    torch.bfloat16: Tolerance(5e-3, 5e-3, 8e-3, 2e-2),
}
DTYPES = tuple(TOLERANCE)
GATES = ("g", "beta")
ZERO = 1e-30  # a reference with an RMS below this is zero


def rms(x: Tensor) -> float:
    return x.detach().double().square().mean().sqrt().item() if x.numel() else 0.0


def rms_error(out: Tensor, ref: Tensor, floor: float = ZERO) -> float:
    """RMS(out - ref) / max(RMS(ref), floor)."""
    assert out.shape == ref.shape, f"shape {list(out.shape)}, expected {list(ref.shape)}"
    return rms(out.double() - ref.double()) / max(rms(ref), floor) if out.numel() else 0.0


def assert_error(name: str, out: Tensor, ref: Tensor, ceiling: float, floor: float = ZERO) -> None:
    error = rms_error(out, ref, floor)
    assert error <= ceiling, f"{name}: RMS error {error:.2e}, ceiling {ceiling:.0e}"


def assert_outputs(outs: Sequence[Tensor], refs: Sequence[Tensor], dtype: torch.dtype) -> None:
    """(o or y, state) within the tolerances of ``dtype``."""
    assert_error("output", outs[0], refs[0], TOLERANCE[dtype].output)
    assert_error("state", outs[1], refs[1], TOLERANCE[dtype].state)


def assert_gradients(
    grads: dict[str, Tensor], refs: dict[str, Tensor], dtype: torch.dtype, dg_floor: float = ZERO
) -> None:
    assert grads.keys() == refs.keys()
    for name, grad in grads.items():
        ceiling = TOLERANCE[dtype].gate_gradient if name in GATES else TOLERANCE[dtype].gradient
        assert_error(f"d{name}", grad, refs[name], ceiling, dg_floor if name == "g" else ZERO)


def _bytes(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8)


def assert_bitwise(out: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal bits; so NaN equals NaN, and 0 differs from -0."""
    assert out.shape == expected.shape and out.dtype == expected.dtype, what
    same = _bytes(out) == _bytes(expected)
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} bytes differ"


# ---- inputs: named tuples in the order of the schemas


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


class DeltaShape(NamedTuple):
    reason: str
    B: int = 1
    T: int = 70
    Hk: int = 1
    H: int = 2
    K: int = 8
    V: int = 12
    cu_seqlens: tuple[int, ...] | None = None
    l2norm: bool = True
    state: bool = True

    @property
    def N(self) -> int:
        return self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1


class ConvShape(NamedTuple):
    reason: str
    B: int = 2
    T: int = 20
    D: int = 12
    R: int = 5
    W: int = 4
    cu_seqlens: tuple[int, ...] | None = None
    silu: bool = True
    bias: bool = True
    state: bool = True

    @property
    def N(self) -> int:
        return self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1


PACKED = (0, 0, 1, 4, 4, 68, 132, 133, 200, 200)  # empty first, middle and last; 1, 3, 64, 65 and 67 tokens

LENGTHS = (1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129)
DELTA_SHAPES = (
    *(DeltaShape(f"T = {T}", T=T) for T in LENGTHS),
    DeltaShape("a batch, one head", B=3, H=1, V=8),
    DeltaShape("three value heads per key head", B=2, Hk=2, H=6),
    DeltaShape("without l2norm", l2norm=False),
    DeltaShape("without initial state", state=False),
    DeltaShape("K and V are no multiple of a vector, K > V", K=13, V=7),
    DeltaShape("K = V = 1", K=1, V=1, l2norm=False),
    DeltaShape("the 2B model's heads, K = 96, V = 256: unsupported or never tested elsewhere", K=96, V=256, Hk=2),
    DeltaShape("K = 128, V = 128, GVA", K=128, V=128),
    DeltaShape("the search's largest V", K=64, V=576, H=1, T=66),
    DeltaShape("the search's largest K", K=256, V=144, H=1, T=66),
    DeltaShape("packed, empty sequences among them", T=200, cu_seqlens=PACKED, Hk=2, H=4),
    DeltaShape("packed, without initial state", T=200, cu_seqlens=PACKED, state=False),
)

CONV_SHAPES = (
    *(ConvShape(f"T = {T}", T=T) for T in (1, 2, 3, 4, 17, 65)),
    *(ConvShape(f"W = {W}", W=W) for W in (2, 3, 4)),
    ConvShape("without bias, without activation", bias=False, silu=False),
    ConvShape("without state", state=False),
    ConvShape("D and R are no multiple of a vector", D=37, R=19, T=33),
    ConvShape("several tiles of channels and of tokens", D=272, R=70, T=150, B=1),
    ConvShape("one channel, one generator unit", D=1, R=1, T=9),
    ConvShape("several blocks of tokens, forward and backward", D=5, R=3, T=4200, B=1),
    ConvShape("packed over several blocks of tokens", D=20, R=9, T=1100, B=1, cu_seqlens=(0, 3, 530, 530, 1100)),
    ConvShape("packed, empty sequences among them", B=1, T=200, cu_seqlens=PACKED),
    ConvShape("packed, W = 2, without state", B=1, T=200, W=2, cu_seqlens=PACKED, state=False),
)


def ids(case: Any) -> str | None:
    """Pytest ids: the reason of a case, the name of a dtype."""
    if isinstance(case, torch.dtype):
        return str(case).removeprefix("torch.")
    return getattr(case, "reason", None)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _offsets(cu_seqlens: tuple[int, ...] | None, dtype: torch.dtype = torch.int32) -> Tensor | None:
    return None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=dtype)


def delta_inputs(shape: DeltaShape, dtype: torch.dtype, seed: int = 0) -> DeltaInputs:
    """Ordinary values: decays of a few percent to a half per token, beta in (0, 1)."""
    torch.manual_seed(seed)
    B, T, H, acc = shape.B, shape.T, shape.H, accumulator(dtype)
    q, k = (torch.randn(B, T, shape.Hk, shape.K, dtype=torch.float64) for _ in "qk")
    if not shape.l2norm:
        k = k * shape.K**-0.5  # |k| near 1, or the recurrence grows without bound
    v = torch.randn(B, T, H, shape.V, dtype=torch.float64)
    g = -torch.rand(B, T, H, dtype=torch.float64) * 0.5
    beta = torch.rand(B, T, H, dtype=torch.float64)
    S = torch.randn(shape.N, H, shape.K, shape.V, dtype=torch.float64) if shape.state else None
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


def conv_inputs(shape: ConvShape, dtype: torch.dtype, seed: int = 0) -> ConvInputs:
    torch.manual_seed(seed)
    x = torch.randn(shape.B, shape.T, shape.D, dtype=torch.float64)
    hidden = torch.randn(shape.B, shape.T, shape.R, dtype=torch.float64)
    weight = torch.randn(shape.D * shape.W, shape.R, dtype=torch.float64) * shape.R**-0.5
    bias = torch.randn(shape.D * shape.W, dtype=torch.float64).to(dtype) if shape.bias else None
    state = torch.randn(shape.N, shape.D, shape.W - 1, dtype=torch.float64).to(dtype) if shape.state else None
    return ConvInputs(
        x.to(dtype), hidden.to(dtype), weight.to(dtype), bias, state, _offsets(shape.cu_seqlens), shape.silu
    )


def apply_inputs(shape: ConvShape, dtype: torch.dtype, seed: int = 0) -> ApplyInputs:
    x, _, _, _, state, cu_seqlens, silu = conv_inputs(shape, dtype, seed)
    kernels = torch.randn(shape.B, shape.T, shape.D, shape.W, dtype=torch.float64).to(dtype)
    return ApplyInputs(x, kernels, state, cu_seqlens, silu)


# ---- gradients, from the reference and from a backend, by argument name

REFERENCE: dict[str, Callable] = {
    "chunk_gated_delta_rule": gated_delta_rule,
    "dynamic_conv": dynamic_conv,
    "apply_dynamic_conv": apply_dynamic_conv,
}


def floating(inputs: NamedTuple) -> dict[str, Tensor]:
    return {name: t for name, t in inputs._asdict().items() if isinstance(t, Tensor) and t.is_floating_point()}


def cotangents(inputs: NamedTuple, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Gradients of the two outputs: of o or y (shaped and typed as v or x), and of the state."""
    generator = torch.Generator().manual_seed(seed)
    like = inputs.v if isinstance(inputs, DeltaInputs) else inputs.x
    N = inputs[0].shape[0] if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
    if isinstance(inputs, DeltaInputs):
        shape, dtype = (N, like.shape[2], inputs.q.shape[3], like.shape[3]), accumulator(like.dtype)
    else:
        W = inputs.weight.shape[0] // like.shape[2] if isinstance(inputs, ConvInputs) else inputs.kernels.shape[3]
        shape, dtype = (N, like.shape[2], W - 1), like.dtype
    return (
        torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype),
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),
    )


def _differentiate(
    function: Callable, inputs: NamedTuple, grads: Sequence[Tensor | None], convert: Callable
) -> dict[str, Tensor]:
    leaves = {name: convert(t.detach()).requires_grad_() for name, t in floating(inputs).items()}
    outs = function(*inputs._replace(**leaves))
    used = [(out, grad.to(out.dtype)) for out, grad in zip(outs, grads) if grad is not None and out.requires_grad]
    if not used:  # no tokens and no state: nothing depends on anything
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        [out for out, _ in used],
        list(leaves.values()),
        [grad for _, grad in used],
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, found))


def reference_gradients(op: str, inputs: NamedTuple, grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """fp64 differentiation of the definition."""
    return _differentiate(REFERENCE[op], inputs, grads, lambda t: t.double())


def dg_floor(outs: tuple[Tensor, Tensor], grads: Sequence[Tensor | None]) -> float:
    """The size of the terms that make dg: <o, dO> of a token and <S1, dS1> of a head.

    dg itself is zero before anything is remembered, and of a few tokens a sum of terms that may nearly cancel. Its
    accuracy under strong decay, where it is tiny, has tests of its own (test_gate_gradient.py).
    """
    dims = (-1, (-2, -1))
    return sum(
        rms((out.double() * grad.double()).sum(d)) for out, grad, d in zip(outs, grads, dims) if grad is not None
    )


def check_outputs(backend: "OpsBackend", op: str, inputs: NamedTuple) -> None:
    """Forward against the definition."""
    assert_outputs(backend(op, *inputs), REFERENCE[op](*inputs), inputs[0].dtype)


def check_gradients(
    backend: "OpsBackend", op: str, inputs: NamedTuple, grads: Sequence[Tensor | None] | None = None
) -> None:
    """Gradients against fp64 differentiation of the definition."""
    grads = cotangents(inputs) if grads is None else grads
    floor = dg_floor(REFERENCE[op](*inputs), grads) if isinstance(inputs, DeltaInputs) else ZERO
    refs = reference_gradients(op, inputs, grads)
    assert_gradients(backend.gradients(op, inputs, grads), refs, inputs[0].dtype, floor)


class OpsBackend:
    """torch.ops.jet, differentiated by autograd."""

    name = "ops"
    functions = torch.ops.jet

    def __call__(self, op: str, *args):
        return getattr(self.functions, op)(*args)

    def gradients(self, op: str, inputs: NamedTuple, grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Gradients by name, for the cotangents ``grads`` of (output, state); ``None`` is a cotangent that is not
        there.
        """
        return _differentiate(
            getattr(self.functions, op), inputs, grads, lambda t: t.clone(memory_format=torch.preserve_format)
        )


class PlainBackend(OpsBackend):
    """The plain PyTorch functions that serve CUDA tensors, here on CPU tensors; differentiated by their backward
    functions.
    """

    name = "plain"
    functions = SimpleNamespace(
        **{
            name: getattr(module, name)
            for module in (
                plain_chunk_gated_delta_rule,
                plain_recurrent_gated_delta_rule,
                plain_dynamic_conv,
                plain_dynamic_conv_step,
                plain_apply_dynamic_conv,
                plain_recurrent_gated_delta_rule_verify,
                plain_recurrent_gated_delta_rule_commit,
            )
            for name in dir(module)
            if name == module.__name__.rpartition(".")[2] or name.endswith("_backward")
        }
    )

    def gradients(self, op: str, inputs: NamedTuple, grads: Sequence[Tensor | None]) -> dict[str, Tensor]:
        found = getattr(self.functions, op + "_backward")(*grads, *inputs)
        return {name: grad for name, value, grad in zip(inputs._fields, inputs, found) if value is not None}


BACKENDS = (OpsBackend(), PlainBackend())


def backend_id(backend: OpsBackend) -> str:
    return backend.name


# ---- layouts of the same values

LAYOUTS = ("contiguous", "padded", "stepped", "reversed dims", "shifted")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The values of ``t`` behind other strides; what lies between them is NaN."""
    if layout == "contiguous" or t.dim() == 0:
        return t.contiguous()
    if layout == "reversed dims":
        dims = tuple(reversed(range(t.dim())))
        return t.permute(dims).contiguous().permute(dims)
    filler = float("nan") if t.is_floating_point() else 1 << 30
    if layout == "shifted":
        out = t.new_full((t.numel() + 1,), filler)[1:].view(t.shape)
    elif layout == "stepped":
        out = t.new_full((*t.shape, 2), filler)[..., 0]
    else:
        out = t.new_full((*t.shape[:-1], t.shape[-1] + 3), filler)[..., 1 : t.shape[-1] + 1]
    out.copy_(t)
    return out


def with_layouts(inputs: NamedTuple, layouts: Sequence[str]) -> NamedTuple:
    tensors = [name for name, t in inputs._asdict().items() if isinstance(t, Tensor)]
    return inputs._replace(**{n: laid_out(getattr(inputs, n), layout) for n, layout in zip(tensors, layouts)})


# ---- hypothesis strategies

seeds = st.integers(0, 2**31 - 1)
tokens = st.one_of(st.integers(1, 20), st.sampled_from(LENGTHS))
layouts = st.lists(st.sampled_from(LAYOUTS), min_size=7, max_size=7)


@st.composite
def splits(draw, T: int, most: int = 4) -> list[int]:
    """Lengths that sum to T, zeros among them."""
    cuts = sorted(draw(st.lists(st.integers(0, T), max_size=most)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, T])]


@st.composite
def offsets(draw, longest: int = 70, most: int = 5) -> tuple[int, ...]:
    """cu_seqlens of up to ``most`` sequences, empty ones among them."""
    lengths = draw(
        st.lists(st.one_of(st.just(0), st.integers(1, 5), st.integers(0, longest)), min_size=1, max_size=most)
    )
    return tuple(sum(lengths[:n]) for n in range(len(lengths) + 1))


@st.composite
def delta_shapes(draw, packed: bool | None = None) -> DeltaShape:
    Hk = draw(st.integers(1, 2))
    cu_seqlens = draw(offsets()) if packed or (packed is None and draw(st.booleans())) else None
    return DeltaShape(
        "drawn",
        B=draw(st.integers(1, 3)) if cu_seqlens is None else 1,
        T=draw(tokens) if cu_seqlens is None else cu_seqlens[-1],
        Hk=Hk,
        H=Hk * draw(st.integers(1, 3)),
        K=draw(st.integers(3, 20)),
        V=draw(st.integers(1, 20)),
        cu_seqlens=cu_seqlens,
        l2norm=draw(st.booleans()),
        state=draw(st.booleans()),
    )


@st.composite
def conv_shapes(draw, packed: bool | None = None) -> ConvShape:
    cu_seqlens = draw(offsets()) if packed or (packed is None and draw(st.booleans())) else None
    return ConvShape(
        "drawn",
        B=draw(st.integers(1, 3)) if cu_seqlens is None else 1,
        T=draw(tokens) if cu_seqlens is None else cu_seqlens[-1],
        D=draw(st.integers(1, 40)),
        R=draw(st.integers(1, 20)),
        W=draw(st.integers(2, 4)),
        cu_seqlens=cu_seqlens,
        silu=draw(st.booleans()),
        bias=draw(st.booleans()),
        state=draw(st.booleans()),
    )
