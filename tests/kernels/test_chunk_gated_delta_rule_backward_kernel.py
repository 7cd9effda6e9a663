"""The Hopper kernels of the chunked gated delta rule's backward: their properties on the simulator and on a GPU, their
cost, their machine code.
"""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arguments import DeltaInputs, cotangents, delta_inputs, floating
from support.backends import dg_floor, reference_gradients
from support.comparison import GATES, ZERO, assert_bitwise, assert_error, rms
from support.device_backends import (
    EARLY,
    assert_every_schedule_agrees,
    each_device,
    each_machine,
    hoppersim,
    simulated,
)
from support.kernel_code import disassembly, report
from support.layouts import far_apart, with_layouts
from support.memory import poisoned_allocations
from support.sequence_properties import sequences
from support.shapes import LENGTHS, PACKED, DeltaShape, ids
from support.strategies import layouts, offsets, seeds

from benchmarks import counters as counting
from benchmarks import ops
from benchmarks.shapes import SHAPES as MEASURED
from benchmarks.shapes import Draw
from reference.chunk_gated_delta_rule import chunk_gated_delta_rule as reference_forward
from reference.chunk_gated_delta_rule import chunk_gated_delta_rule_backward as reference_backward

OP = "chunk_gated_delta_rule"
BACKWARD = OP + "_backward"
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
KEY_DIMS = (64, 96, 128, 192, 256)
# Operands are in the dtype of q: gradients have the error of a few roundings.
CEILING = {BF16: 8e-3, F16: 2e-3}
GATE_CEILING = {BF16: 1e-2, F16: 2e-3}
CUT = 3072 + 37  # tokens: one sequence of few heads is cut

SHAPES = (
    *(DeltaShape(f"K = {K}", T=130, H=1, Hk=1, K=K, V=64) for K in KEY_DIMS),
    *(DeltaShape(f"V = {V}", T=70, H=1, K=64, V=V) for V in (16, 48, 144, 208, 576)),
    *(DeltaShape(f"T = {T}", T=T, H=1, K=64, V=32) for T in LENGTHS),
    DeltaShape("the 2B model's heads", T=129, H=2, Hk=2, K=96, V=256),
    DeltaShape("the 4B model's heads", T=129, H=1, Hk=1, K=128, V=256),
    DeltaShape("128/128, two value heads per key head", B=2, T=129, Hk=1, H=2, K=128, V=128),
    DeltaShape("three value heads per key head", B=2, T=66, Hk=2, H=6, K=64, V=64),
    DeltaShape("two value heads per key head, K = 256", T=66, Hk=1, H=2, K=256, V=64),
    DeltaShape("without l2norm", B=2, T=100, K=96, V=64, l2norm=False),
    DeltaShape("without initial state", B=3, T=100, K=64, V=64, state=False),
    DeltaShape("packed, empty sequences among them", T=200, cu_seqlens=PACKED, Hk=2, H=4, K=96, V=128),
    DeltaShape("packed, without initial state", T=200, cu_seqlens=PACKED, K=128, V=64, state=False),
)
AGREE = ("the 2B model's heads", "three value heads per key head", "packed, empty sequences among them", "K = 256")


def random(dtype=BF16, seed: int = 0, **shape) -> DeltaInputs:
    return delta_inputs(DeltaShape("", **{"K": 64, "V": 32, **shape}), dtype, seed)


def expected_gradients(inputs: DeltaInputs, grads) -> dict[str, torch.Tensor]:
    """Of the reference in chunks, in fp64; `test_reference` proves that they equal the token loop's."""
    return dict(zip(DeltaInputs._fields, reference_backward(*grads, *inputs)))


class Floors(NamedTuple):
    """The size of the terms that make dg and dbeta, which of a few tokens may nearly cancel (see `dg_floor`)."""

    g: float = ZERO
    beta: float = ZERO


def floors_of(inputs: DeltaInputs, grads, expected) -> Floors:
    """dbeta is the product of two vectors of V numbers: U', about V, and (T^T dU), about dV / beta."""
    rows = expected["v"].norm(dim=-1) / inputs.beta.double().clamp(min=0.1) * inputs.v.double().norm(dim=-1)
    return Floors(dg_floor(reference_forward(*inputs), grads), rms(rows) / inputs.v.shape[-1] ** 0.5)


def compare(found, expected, inputs: DeltaInputs, floors: Floors = Floors()) -> None:
    dtype = inputs.q.dtype
    for name, grad in found.items():
        ceiling = GATE_CEILING[dtype] if name in GATES else CEILING[dtype]
        assert_error(f"d{name}", grad, expected[name], ceiling, getattr(floors, name, ZERO))


def check(backend, inputs: DeltaInputs, grads=None) -> None:
    grads = cotangents(inputs) if grads is None else grads
    expected = expected_gradients(inputs, grads)
    compare(backend.gradients(OP, inputs, grads), expected, inputs, floors_of(inputs, grads, expected))


# ---- equals the reference


@each_device
@pytest.mark.parametrize("dtype", (BF16, F16), ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_equals_the_reference(backend, dtype, shape):
    check(backend, delta_inputs(shape, dtype))


@each_device
def test_equals_differentiation_of_the_token_loop(backend):
    inputs = random(T=70, H=2)
    grads = cotangents(inputs)
    compare(backend.gradients(OP, inputs, grads), reference_gradients(OP, inputs, grads), inputs)


@each_device
@settings(max_examples=10)
@given(
    K=st.sampled_from(KEY_DIMS),
    V=st.integers(1, 12).map(lambda n: 16 * n),
    Hk=st.integers(1, 2),
    group=st.integers(1, 3),
    B=st.integers(1, 2),
    T=st.integers(1, 140),
    cu_seqlens=st.none() | offsets(longest=140),
    dtype=st.sampled_from((BF16, F16)),
    l2norm=st.booleans(),
    state=st.booleans(),
    layouts=layouts,
    seed=seeds,
)
def test_any_shape_dtype_and_layout(backend, K, V, Hk, group, B, T, cu_seqlens, dtype, l2norm, state, layouts, seed):
    if cu_seqlens is not None:
        B, T = 1, cu_seqlens[-1]
    inputs = delta_inputs(DeltaShape("", B, T, Hk, Hk * group, K, V, cu_seqlens, l2norm, state), dtype, seed)
    other, grads = with_layouts(inputs, layouts), cotangents(inputs)
    check(backend, other, grads)
    expected = backend.gradients(OP, inputs, grads)
    for name, grad in backend.gradients(OP, other, grads).items():
        assert_bitwise(grad, expected[name], f"d{name}, other layout")


@each_device
@pytest.mark.parametrize("which", (0, 1), ids=("of the outputs alone", "of the final state alone"))
def test_gradients_of_one_cotangent(backend, which):
    """Decays within a chunk are resolved down to 6e-8: what passes a stronger one alone is less precise."""
    inputs = random(T=70, K=128)
    inputs = inputs._replace(g=inputs.g / 4)
    o, state = cotangents(inputs)
    check(backend, inputs, (o, None) if which == 0 else (torch.zeros_like(o), state))


@each_device
@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64), ids=ids)
@pytest.mark.parametrize("g_dtype, beta_dtype", ((F32, BF16), (BF16, F32)), ids=ids)
def test_gates_and_offsets_of_other_dtypes(backend, index_dtype, g_dtype, beta_dtype):
    inputs = random(T=200, cu_seqlens=PACKED)
    inputs = inputs._replace(
        g=inputs.g.to(g_dtype), beta=inputs.beta.to(beta_dtype), cu_seqlens=inputs.cu_seqlens.to(index_dtype)
    )
    check(backend, inputs)


@simulated
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.reason in AGREE], ids=ids)
def test_every_schedule_agrees(shape):
    inputs = delta_inputs(shape, BF16)
    assert_every_schedule_agrees(lambda backend: backend(BACKWARD, *cotangents(inputs), *inputs))


# ---- gates


@each_device
@pytest.mark.parametrize("g", (-1e-3, -1e-2, -0.1, -1.0, -5.0, -20.0, -50.0), ids=str)
def test_gates_at_every_decay(backend, g):
    """dg has a relative accuracy, however strong the decay."""
    inputs = random(B=2, T=131, K=96, V=64)
    inputs = inputs._replace(g=torch.full_like(inputs.g, g))
    grads = cotangents(inputs)
    compare(backend.gradients(OP, inputs, grads), expected_gradients(inputs, grads), inputs)


LEVELS = (-1e-2, -3.0, -15.0, -40.0)


@each_device
def test_weak_decays_do_not_blur_the_gradients_of_strong_ones(backend):
    """A token that decays by e^-40 beside one that decays by a hundredth: each level has its own accuracy."""
    inputs = random(B=2, T=131)
    level = torch.tensor([0, 0, 1, 0, 2, 3, 0])[torch.arange(131) % 7][None, :, None].expand_as(inputs.g)
    inputs = inputs._replace(g=torch.tensor(LEVELS)[level])
    grads = cotangents(inputs)
    found, expected = backend.gradients(OP, inputs, grads)["g"], expected_gradients(inputs, grads)["g"]
    for i, g in enumerate(LEVELS):
        assert_error(f"dg at g = {g}", found[level == i], expected[level == i], GATE_CEILING[BF16])


@each_device
@pytest.mark.parametrize("g", (0.0, -104.0, -1000.0, -math.inf), ids=str)
def test_decays(backend, g):
    """0 keeps everything; what is below -104 is clamped, and its gradient is 0."""
    inputs = random(T=130)
    some = inputs.g.clone()
    some[:, 65::7] = g
    check(backend, inputs._replace(g=some))
    every = inputs._replace(g=torch.full_like(inputs.g, g))
    check(backend, every)
    if g < -104:
        assert not backend.gradients(OP, every, cotangents(every))["g"].any()


# ---- hard numbers


@each_device
@pytest.mark.parametrize("signs", ((1, 1), (1, -1)), ids=("identical keys", "alternating keys"))
def test_correlated_keys_with_beta_one(backend, signs):
    inputs = random(T=129, K=128)
    k = inputs.k[:, :1] * torch.tensor(signs, dtype=BF16).repeat(65)[:129, None, None] + 0.3 * inputs.k
    check(backend, inputs._replace(k=k.to(BF16), beta=torch.ones_like(inputs.beta), g=torch.zeros_like(inputs.g)))


@each_device
@pytest.mark.parametrize("spread", (0, 0.01, 0.1), ids=str)
def test_nearly_identical_keys(backend, spread):
    """dV is what large terms leave: T' and what it multiplies keep the 11 bits of fp16, although gradients are bf16."""
    inputs = random(T=127, K=96)
    k = (inputs.k[:, :1] + spread * inputs.k).to(BF16)
    check(backend, inputs._replace(k=k, g=torch.full_like(inputs.g, -1e-3)))


@each_device
@pytest.mark.parametrize("l2norm", (True, False))
def test_zero_keys_queries_and_beta(backend, l2norm):
    """Without l2norm a zero row has a gradient; with it one of 1000 times what follows it."""
    inputs = random(T=130, l2norm=l2norm)
    if not l2norm:
        inputs = inputs._replace(k=inputs.k / 8)
    inputs.q[:, ::3], inputs.k[:, ::5], inputs.beta[:, ::2] = 0, 0, 0
    check(backend, inputs)


@each_device
def test_zero_rows_in_fp16_under_a_scaled_loss(backend):
    """The gradient of a row of zeros is 1000 times what follows it, which fp16 may not hold; no other is NaN for it."""
    inputs = random(F16, T=130)
    inputs.q[:, 3::30], inputs.k[:, 5::30] = 0, 0
    grads = tuple((grad * 1024).to(grad.dtype) for grad in cotangents(inputs))
    found, expected = backend.gradients(OP, inputs, grads), expected_gradients(inputs, grads)
    others = {"q": (inputs.q != 0).any(-1), "k": (inputs.k != 0).any(-1)}
    for name, grad in found.items():
        keep = others.get(name, ...)
        assert_error(f"d{name}", grad[keep], expected[name][keep], GATE_CEILING[F16] if name in GATES else CEILING[F16])


@each_device
def test_keys_that_no_head_reads(backend):
    inputs = random(T=70)
    none = inputs._replace(v=inputs.v[:, :, :0], g=inputs.g[:, :, :0], beta=inputs.beta[:, :, :0])
    none = none._replace(initial_state=inputs.initial_state[:, :0])
    o, state = cotangents(inputs)
    with poisoned_allocations():
        found = backend(BACKWARD, o[:, :, :0], state[:, :0], *none)
    assert not found[0].any() and not found[1].any()


@each_device
@pytest.mark.parametrize("size", (1e-6, 1e4), ids=str)
def test_gradients_of_any_size(backend, size):
    """bf16 has the range of fp32."""
    inputs = random(T=130)
    check(backend, inputs, tuple((grad * size).to(grad.dtype) for grad in cotangents(inputs)))


# ---- calls, rows, sequences, segments


@each_device
def test_packed_sequences_equal_separate_ones_to_the_bit(backend):
    inputs = random(T=200, cu_seqlens=PACKED, K=96, V=48)
    grads = cotangents(inputs)
    packed = backend.gradients(OP, inputs, grads)
    for n, here, alone in sequences(inputs):
        separate = backend.gradients(OP, alone, (grads[0][:, here], grads[1][n : n + 1]))
        for name, grad in separate.items():
            cut = packed[name][n : n + 1] if name == "initial_state" else packed[name][:, here]
            assert_bitwise(cut, grad, f"d{name} of sequence {n}")


@each_device
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
@pytest.mark.parametrize("n", range(4))
@pytest.mark.parametrize("cu_seqlens", (None, (0, 5, 70, 70, 141)), ids=("rows", "packed"))
def test_nan_stays_in_its_sequence(backend, cu_seqlens, n, value):
    inputs = random(T=141 if cu_seqlens else 70, B=1 if cu_seqlens else 4, cu_seqlens=cu_seqlens)
    grads = cotangents(inputs)
    bad = inputs._replace(**{name: t.clone() for name, t in floating(inputs).items()})
    bad_grads = tuple(grad.clone() for grad in grads)
    here = (0, slice(*cu_seqlens[n : n + 2])) if cu_seqlens else (n,)
    for name, t in zip(bad._fields, bad[:5]):
        t[here] = -abs(value) if name == "g" else value  # a g above 0 is refused
    bad_grads[0][here] = value
    bad.initial_state[n], bad_grads[1][n] = value, value
    clean, dirty = backend.gradients(OP, inputs, grads), backend.gradients(OP, bad, bad_grads)
    for name in clean:
        at = (n,) if name == "initial_state" else here
        clean[name][at], dirty[name][at] = 0, 0
        assert_bitwise(dirty[name], clean[name], f"d{name}")


@each_device
@pytest.mark.parametrize(
    "shape",
    (
        DeltaShape("no tokens", B=2, T=0, K=64, V=32),
        DeltaShape("no rows", B=0, T=5, K=64, V=32),
        DeltaShape("no sequences", T=0, cu_seqlens=(0,), K=64, V=32),
        DeltaShape("empty sequences only", T=0, cu_seqlens=(0, 0, 0), K=64, V=32),
        DeltaShape("no tokens, no state", B=2, T=0, K=64, V=32, state=False),
    ),
    ids=ids,
)
def test_nothing_to_do(backend, shape):
    """The gradient of the final state is that of the initial one."""
    inputs = delta_inputs(shape, BF16)
    grads = cotangents(inputs)
    found = backend(BACKWARD, *grads, *inputs)
    assert all(grad.numel() == 0 for grad in found[:5])
    assert_bitwise(found[5], grads[1], "dinitial_state")


@each_device
@pytest.mark.parametrize("decay", (0.0, 0.01), ids=str)
def test_segments(backend, decay):
    inputs = random(T=CUT, H=1, V=16)
    check(backend, inputs._replace(g=inputs.g * decay))


@each_device
def test_segments_of_packed_sequences(backend):
    """Some cut, some not, some empty; without initial state."""
    inputs = random(T=4700, H=1, V=16, cu_seqlens=(0, 0, 5, 4101, 4101, 4700), state=False)
    check(backend, inputs._replace(g=inputs.g * 0.01))


@simulated
def test_which_kernels_run():
    def kernels(**shape) -> list[str]:
        inputs = random(**shape)
        EARLY(BACKWARD, *cotangents(inputs), *inputs)
        return [
            counting.short(launch["mangled"]).removeprefix("chunk_").removesuffix("_kernel")
            for launch in hoppersim.launches()
        ]

    assert kernels(T=128, H=1, V=16) == ["prepare", "sweep", "reverse", "gradients"]
    assert kernels(T=128, H=1, V=16, cu_seqlens=(0, 100, 128))[0] == "plan"
    cut = ["prepare", "sweep", "join", "sweep", "reverse", "join", "reverse", "gradients"]
    assert kernels(T=3009, H=1, V=16) == cut


# ---- memory


@each_device
@pytest.mark.parametrize("shape", (*SHAPES[:3], *SHAPES[-6:]), ids=ids)
def test_every_element_is_written(backend, shape):
    inputs = delta_inputs(shape, BF16)
    arguments = (*cotangents(inputs), *inputs)
    expected = backend(BACKWARD, *arguments)
    with poisoned_allocations():
        for out, ref in zip(backend(BACKWARD, *arguments), expected):
            assert_bitwise(out, ref)


@each_device
def test_arguments_stay_and_runs_repeat_to_the_bit(backend):
    inputs = random(T=200, cu_seqlens=PACKED)
    arguments = (*cotangents(inputs), *inputs[:6])
    before, first = [t.clone() for t in arguments], backend(BACKWARD, *arguments, *inputs[6:])
    for out, again in zip(first, backend(BACKWARD, *arguments, *inputs[6:])):
        assert_bitwise(again, out)
    for t, kept in zip(arguments, before):
        assert_bitwise(t, kept)


@each_machine
@pytest.mark.parametrize("dim", (0, 1), ids=("rows", "tokens"))
@pytest.mark.parametrize("name", ("q", "v", "grad_o"))
def test_strides_beyond_32_bits(backend, name, dim):
    inputs = random(B=2, T=3)
    o, state = cotangents(inputs)
    expected = backend(BACKWARD, o, state, *inputs)
    if name == "grad_o":
        o = far_apart(o, dim)
    else:
        inputs = inputs._replace(**{name: far_apart(getattr(inputs, name), dim)})
    for out, ref in zip(backend(BACKWARD, o, state, *inputs), expected):
        assert_bitwise(out, ref, name)


# ---- cost, counted by the simulator

FEW_HEADS = {"2b": (4, 4), "4b": (4, 4), "128/128": (8, 4)}  # value heads, key heads: in the proportion of the model
BYTES = {"2b": 9890, "4b": 11720, "128/128": 7010}  # requested for a token and value head


@simulated
@pytest.mark.parametrize("shape", MEASURED, ids=lambda shape: shape.name)
def test_cost(shape):
    """Of 1024 tokens: bytes, tensor-core work, bank conflicts."""
    H, Hk = FEW_HEADS[shape.name]
    case = ops.chunk_backward(shape._replace(H=H, Hk=Hk), 1, 1024)
    with hoppersim.simulate():
        ops.results(case.op, case.make(Draw()), "jet_sim")
    launches = {counting.short(launch["mangled"]): launch["counters"] for launch in hoppersim.launches()}
    whole = counting.added(list(launches.values()))
    assert sum(counting.traffic(whole)) <= BYTES[shape.name] * 1024 * H
    assert whole["tensor_flop"] <= 1.1 * case.work.flop
    for name, counters in launches.items():
        assert counting.conflict_factor(counters) < 1.1, name
    for name in ("sweep", "reverse"):
        assert counting.conflict_factor(launches[f"chunk_{name}_kernel"]) == 1.0
        assert launches[f"chunk_{name}_kernel"]["global_read_bytes"] == 0, "everything comes by TMA and bulk copies"


# ---- what the compiler made

FOLDER = "csrc.gated_delta_rule.chunk.backward"
PASSES = {  # objects, and the kernels of each
    "states": ("states", "sweep", 1),
    "reverse": ("reverse_bf16", "reverse", 1),
    "reverse, fp16": ("reverse_f16", "reverse", 1),
    "gradients": ("gradients_bf16", "gradients", 1),
    "gradients, fp16": ("gradients_f16", "gradients", 1),
    "prepare": ("launch", "prepare", 2),
}


@pytest.mark.parametrize("name", PASSES)
def test_machine_code(name):
    stem, kernel, dtypes = PASSES[name]
    kernels = {mangled: facts for mangled, facts in report(f"{FOLDER}.{stem}").items() if f"{kernel}_kernel" in mangled}
    assert len(kernels) == dtypes * len(KEY_DIMS)
    for mangled, facts in kernels.items():
        assert facts.spill_bytes == 0 and facts.stack_bytes == 0, mangled
        code = disassembly(f"{FOLDER}.{stem}")[mangled]
        assert not code.uses("LDL", "STL", "ATOM", "RED"), mangled
        assert code.uses("HGMMA") and code.uses("UTMALDG"), mangled
        assert kernel == "prepare" or code.uses("USETMAXREG"), mangled
