"""The Hopper kernels of the dynamic convolution: their properties on the simulator and on a GPU, their cost, their
machine code.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import pool_properties
from support.arguments import ApplyInputs, ConvInputs, StepCall, inputs_of, step_call, with_rows
from support.backends import check_outputs
from support.comparison import assert_bitwise
from support.device_backends import assert_every_schedule_agrees, each_device, hoppersim, simulated
from support.jet_sim import jet_sim
from support.kernel_code import disassembly, report
from support.layouts import with_layouts
from support.memory import poisoned_allocations
from support.pool_properties import run
from support.sequence_properties import any_split_equals_one_call, sequences
from support.shapes import PACKED, ConvShape, ids
from support.strategies import layouts, seeds, splits

BF16, F16 = torch.bfloat16, torch.float16
each_dtype = pytest.mark.parametrize("dtype", (BF16, F16), ids=ids)
each_op = pytest.mark.parametrize("op", ("dynamic_conv", "apply_dynamic_conv"))

SHAPES = (
    *(ConvShape(f"T = {T}", B=1, T=T, D=32, R=64) for T in (1, 2, 3, 4, 63, 64, 65, 127, 128, 129, 257)),
    *(ConvShape(f"W = {W}", B=2, T=70, D=72, R=72, W=W) for W in (2, 3, 4)),
    *(ConvShape(f"D = {D}", B=1, T=20, D=D, R=16) for D in (8, 24, 40, 256, 264)),
    *(ConvShape(f"R = {R}", B=1, T=140, D=40, R=R) for R in (8, 56, 64, 136, 384, 512, 520, 1032)),
    ConvShape("a batch of short rows: a tile has many of them", B=50, T=7, D=32, R=64),
    ConvShape("several channel tiles in a CTA, the warpgroups in turns", B=1, T=1000, D=1256, R=72),
    ConvShape("the same where hidden does not stay in shared memory", B=1, T=1000, D=1256, R=520, W=2),
    ConvShape("without bias, without activation", B=2, T=30, D=32, R=64, bias=False, silu=False),
    ConvShape("without state", B=3, T=30, D=32, R=64, state=False),
    ConvShape("packed, empty sequences among them", B=1, T=200, D=40, R=64, cu_seqlens=PACKED),
    ConvShape("packed, W = 2, without state", B=1, T=200, D=32, R=64, W=2, cu_seqlens=PACKED, state=False),
    ConvShape("packed, W = 3", B=1, T=200, D=32, R=64, W=3, cu_seqlens=PACKED),
    ConvShape("packed, many single tokens", B=1, T=150, D=32, R=64, cu_seqlens=tuple(range(151))),
    ConvShape("only empty sequences", B=1, T=0, D=32, R=64, cu_seqlens=(0, 0, 0)),
    ConvShape("no tokens", B=2, T=0, D=32, R=64),
    ConvShape("no tokens, without state", B=2, T=0, D=32, R=64, state=False),
)
AGREE = (
    "T = 64",
    "T = 257",
    "W = 3",
    "R = 520",
    "packed, empty sequences among them",
    "several channel tiles in a CTA, the warpgroups in turns",
)


def random_step(dtype=BF16, seed: int = 0, P: int = 5, N: int = 3, D: int = 40, R: int = 64, **shape) -> StepCall:
    return step_call(ConvShape("", B=N, D=D, R=R, **shape), dtype, P=P, seed=seed)


# ---- whole sequences


@each_device
@each_op
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_equals_the_reference(backend, op, dtype, shape):
    check_outputs(backend, op, inputs_of(op, shape, dtype))


def apart(indices: torch.Tensor) -> torch.Tensor:
    """The same numbers with others between them."""
    return torch.stack((indices, torch.full_like(indices, -7)), 1)[:, 0]


@each_device
@each_op
def test_offsets_may_have_strides(backend, op):
    inputs = inputs_of(op, ConvShape("", B=1, T=90, D=40, R=64, cu_seqlens=(0, 13, 13, 60, 90)), BF16)
    y, state = backend(op, *inputs)
    again, state_again = backend(op, *inputs._replace(cu_seqlens=apart(inputs.cu_seqlens)))
    assert_bitwise(again, y, "y")
    assert_bitwise(state_again, state, "state")


@each_device
@each_op
def test_one_token_of_several_sequences_may_have_any_stride(backend, op):
    """A contiguous x [B,1,D] from a transposed [B,D,1]: the stride of its one token says nothing of the rows."""
    inputs = inputs_of(op, ConvShape("", B=3, T=1, D=40, R=64), BF16)
    x = torch.empty_strided((3, 1, 40), (40, 1, 1), dtype=BF16).copy_(inputs.x)
    assert x.is_contiguous()
    for out, same in zip(backend(op, *inputs._replace(x=x)), backend(op, *inputs)):
        assert_bitwise(out, same, op)


@each_device
def test_rows_of_the_pool_may_have_strides(backend):
    rows = torch.tensor([4, -1, 0])
    call, again = random_step()._replace(state_indices=rows), random_step()._replace(state_indices=apart(rows))
    assert_bitwise(backend("dynamic_conv_step", *again), backend("dynamic_conv_step", *call), "y")
    assert_bitwise(again.pool, call.pool, "pool")


@st.composite
def shapes(draw) -> ConvShape:
    T = draw(st.integers(0, 200))
    packed = draw(st.booleans())
    cu = tuple(sorted([0, T, *draw(st.lists(st.integers(0, T), max_size=6))])) if packed else None
    return ConvShape(
        "",
        B=1 if packed else draw(st.integers(1, 3)),
        T=T,
        D=8 * draw(st.integers(1, 12)),
        R=8 * draw(st.integers(1, 20)),
        W=draw(st.integers(2, 4)),
        cu_seqlens=cu,
        silu=draw(st.booleans()),
        bias=draw(st.booleans()),
        state=draw(st.booleans()),
    )


@each_device
@each_op
@settings(max_examples=40)
@given(
    shape=shapes(),
    dtype=st.sampled_from((BF16, F16)),
    layouts=layouts,
    index=st.sampled_from((torch.int32, torch.int64)),
    seed=seeds,
)
def test_any_shape_and_layout(backend, op, shape, dtype, layouts, index, seed):
    inputs = inputs_of(op, shape, dtype, seed)
    if inputs.cu_seqlens is not None:
        inputs = inputs._replace(cu_seqlens=inputs.cu_seqlens.to(index))
    check_outputs(backend, op, with_layouts(inputs, layouts))


@each_device
@each_op
@given(data=st.data(), T=st.integers(0, 140), W=st.integers(2, 4), seed=seeds)
@settings(max_examples=10)
def test_any_split_equals_one_call(backend, op, data, T, W, seed):
    """A call of 1, 2 or 3 tokens shifts the state instead of overwriting it."""
    any_split_equals_one_call(
        backend, op, inputs_of(op, ConvShape("", B=2, T=T, D=32, R=64, W=W), BF16, seed), data.draw(splits(T))
    )


@each_device
@each_op
def test_packed_equals_separate_to_the_bit(backend, op):
    inputs = inputs_of(op, ConvShape("", B=1, T=200, D=40, R=64, cu_seqlens=PACKED), BF16)
    y, state = backend(op, *inputs)
    for n, here, alone in sequences(inputs):
        if alone[0].numel() == 0:
            continue
        one, one_state = backend(op, *alone)
        assert_bitwise(y[:, here], one, f"output of sequence {n}")
        assert_bitwise(state[n : n + 1], one_state, f"state of sequence {n}")


@each_device
@each_op
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
@pytest.mark.parametrize("n", (1, 5, 6))
def test_nan_stays_in_its_sequence(backend, op, n, value):
    inputs = inputs_of(op, ConvShape("", B=1, T=200, D=40, R=64, cu_seqlens=PACKED), BF16)
    begin, end = inputs.cu_seqlens[n : n + 2].tolist()
    bad = inputs._replace(
        x=inputs.x.clone(), conv_state=inputs.conv_state.clone(), **{inputs._fields[1]: inputs[1].clone()}
    )
    bad.x[:, begin:end], bad[1][:, begin:end], bad.conv_state[n] = value, value, value
    for out, dirty, here in zip(backend(op, *inputs), backend(op, *bad), ((0, slice(begin, end)), (n,))):
        out[here], dirty[here] = 0, 0
        assert_bitwise(dirty, out)


@each_device
@each_op
def test_a_row_does_not_depend_on_the_others_to_the_bit(backend, op):
    """Also where another batch size takes clusters or another cut of the channels."""
    inputs = inputs_of(op, ConvShape("", B=9, T=33, D=72, R=136), BF16)
    y, state = backend(op, *inputs)
    for b in (0, 4, 8):
        tokens = {name: getattr(inputs, name)[b : b + 1] for name in ("x", inputs._fields[1], "conv_state")}
        one, one_state = backend(op, *inputs._replace(**tokens))
        assert_bitwise(one, y[b : b + 1], "output")
        assert_bitwise(one_state, state[b : b + 1], "state")


@each_device
@each_op
def test_every_element_is_written_and_runs_repeat(backend, op):
    inputs = inputs_of(op, ConvShape("", B=1, T=200, D=40, R=64, cu_seqlens=PACKED), BF16)
    expected = backend(op, *inputs)
    with poisoned_allocations():
        for out, ref in zip(backend(op, *inputs), expected):
            assert_bitwise(out, ref)


@each_device
@each_op
def test_zero_generator_leaves_the_bias(backend, op):
    inputs = inputs_of(op, ConvShape("", B=1, T=9, D=32, R=64), BF16)
    check_outputs(backend, op, inputs._replace(**{inputs._fields[1]: torch.zeros_like(inputs[1])}))


# What SiLU does with e^-z near and beyond the end of fp32, and with what is no number.
EXTREMES = (
    0.0,
    -0.0,
    1e-30,
    -1e-30,
    5.0,
    -5.0,
    86.0,
    88.5,
    -86.0,
    -87.0,
    -87.5,
    -88.0,
    -88.5,
    -89.0,
    -100.0,
    -128.0,
    1000.0,
    -1000.0,
    6e4,
    -6e4,
    3e38,
    -3e38,
    math.inf,
    -math.inf,
    math.nan,
    -1.0,
    -20.0,
    -40.0,
    -60.0,
    -80.0,
    1.0,
    20.0,
)


@each_device
@each_op
@each_dtype
@pytest.mark.parametrize("B", (1, 130))
def test_activation_of_extremes(backend, op, dtype, B):
    """z = x: its kernel is 1 for the token itself, 0 for the zeros before it."""
    x = torch.tensor(EXTREMES, dtype=torch.float64).to(dtype).expand(B, 1, -1)
    D, kernel = x.shape[-1], torch.tensor((0.0, 0.0, 0.0, 1.0), dtype=dtype)
    if op == "dynamic_conv":
        inputs = ConvInputs(
            x, torch.zeros(B, 1, 8, dtype=dtype), torch.ones(4 * D, 8, dtype=dtype), kernel.repeat(D), None, None, True
        )
    else:
        inputs = ApplyInputs(x, kernel.expand(B, 1, D, 4).contiguous(), None, None, True)
    y, expected = backend(op, *inputs)[0].double(), torch.nn.functional.silu(x.double()).to(dtype).double()
    close = torch.isclose(
        y, expected, rtol=torch.finfo(dtype).eps, atol=2e-36 if dtype == BF16 else 2**-24, equal_nan=True
    )
    assert close.all(), [(z, got.item(), want.item()) for z, got, want in zip(EXTREMES, y[0, 0], expected[0, 0])]


@simulated
@each_op
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.reason in AGREE], ids=ids)
def test_every_schedule_agrees(op, shape):
    inputs = inputs_of(op, shape, BF16)
    assert_every_schedule_agrees(lambda backend: backend(op, *inputs))


# ---- steps


@each_device
@each_dtype
@pytest.mark.parametrize("W", (2, 3, 4))
@pytest.mark.parametrize("N", (1, 3, 65, 130))
def test_step_equals_the_reference(backend, dtype, W, N):
    pool_properties.check(backend, random_step(dtype, N=N, P=N + 2, W=W, D=72, R=136))


@each_device
@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64), ids=("int32", "int64"))
@pytest.mark.parametrize("rows", (None, (4, 0, 3), (2, -1, 0), (-1, -1, -1), (-7, 4, -1)), ids=str)
def test_step_any_rows_of_the_pool(backend, index_dtype, rows):
    pool_properties.check(backend, with_rows(random_step(), rows, index_dtype))


@each_device
@settings(max_examples=30)
@given(
    N=st.integers(1, 140),
    D=st.integers(1, 12),
    R=st.integers(1, 12),
    W=st.integers(2, 4),
    bias=st.booleans(),
    silu=st.booleans(),
    dtype=st.sampled_from((BF16, F16)),
    layouts=layouts,
    data=st.data(),
    seed=seeds,
)
def test_step_any_shape_and_layout(backend, N, D, R, W, bias, silu, dtype, layouts, data, seed):
    call = random_step(dtype, seed, N=N, P=N + 2, D=8 * D, R=8 * R, W=W, bias=bias, silu=silu)
    rows = data.draw(st.permutations(range(N + 2)))[:N]
    call = with_rows(call, [row if data.draw(st.booleans()) else -row - 1 for row in rows])
    pool_properties.check(backend, with_layouts(call, layouts[:3]))


@each_device
def test_step_pool_properties(backend):
    pool_properties.negative_index_is_not_a_row(backend, random_step())
    pool_properties.other_rows_do_not_matter(backend, random_step(), (3, 0, 1))
    pool_properties.updates_in_place(backend, random_step())
    pool_properties.every_element_is_written(backend, with_rows(random_step(), (4, -1, 2)))
    for value in (math.nan, math.inf):
        pool_properties.nan_stays_in_its_sequence(backend, with_rows(random_step(), (4, 0, 2)), 1, value)


@each_device
def test_step_row_does_not_depend_on_the_others_to_the_bit(backend):
    call = with_rows(random_step(N=140, P=142), range(1, 141))
    y, pool = run(backend, call)
    for n in (0, 70, 139):
        one, one_pool = run(
            backend, with_rows(call._replace(x=call.x[n : n + 1], hidden=call.hidden[n : n + 1]), [n + 1])
        )
        assert_bitwise(one, y[n : n + 1], "output")
        assert_bitwise(one_pool[n + 1], pool[n + 1], "pool")


@each_device
def test_steps_equal_a_prefill_to_the_bit(backend):
    inputs = inputs_of("dynamic_conv", ConvShape("", B=3, T=6, D=40, R=64), BF16)
    y, state = backend("dynamic_conv", *inputs)
    pool = inputs.conv_state.clone()
    for t in range(6):
        step = backend(
            "dynamic_conv_step", inputs.x[:, t], inputs.hidden[:, t], inputs.weight, inputs.bias, pool, None, True
        )
        assert_bitwise(step, y[:, t], f"token {t}")
    assert_bitwise(pool, state, "state")


# ---- cost, counted by the simulator

MODELS = (("2B", 3072, 384), ("4B", 4096, 512))


def traffic(counters: dict) -> int:
    return sum(
        counters[name] for name in ("global_read_bytes", "global_write_bytes", "bulk_read_bytes", "bulk_write_bytes")
    )


@simulated
@pytest.mark.parametrize("name, D, R", MODELS, ids=lambda v: v if isinstance(v, str) else "")
def test_prefill_costs_its_gemm(name, D, R):
    """Weights once per pair of token tiles, everything else once; no kernel of [T, D, W] in memory; no bank
    conflict.
    """
    T, W = 512, 4
    inputs = inputs_of("dynamic_conv", ConvShape("", B=1, T=T, D=D, R=R, state=False), BF16)
    with hoppersim.simulate():
        jet_sim().dynamic_conv(*inputs)
        (launch,) = hoppersim.launches()
    counters, (token_tiles, parts, _) = launch["counters"], launch["grid"]
    assert token_tiles == T // 128 and launch["cluster"] == [2, 1, 1]
    assert counters["tensor_flop"] == 2 * T * D * W * R
    weights = D * W * R * 2 * token_tiles  # once per tile row
    least = T * (2 * D + R) * 2 + D * W * 2 * token_tiles + weights + D * (W - 1) * 2
    assert traffic(counters) <= 1.15 * least
    halo = (W - 1) * (token_tiles - 1) * D * 2
    assert counters["bulk_read_bytes"] == parts * T * R * 2 + weights // 2 + T * D * 2 + halo
    assert counters["shared_wavefronts"] <= 1.02 * counters["shared_ideal_wavefronts"]


@simulated
@pytest.mark.parametrize("N", (1, 128, 256))
@pytest.mark.parametrize("name, D, R", MODELS, ids=lambda v: v if isinstance(v, str) else "")
def test_step_streams_the_weight_once(name, D, R, N):
    W = 4
    call = random_step(N=N, P=N, D=D, R=R)
    with hoppersim.simulate():
        jet_sim().dynamic_conv_step(*call)
        (launch,) = hoppersim.launches()
    token_tiles, parts, _ = launch["grid"]
    assert token_tiles * parts >= (132 if N == 1 else 96), "multiprocessors at work"
    hidden, x = parts * N * R * 2, (N + (W - 1) * (token_tiles - 1)) * D * 2
    assert launch["counters"]["bulk_read_bytes"] == D * W * R * 2 + hidden + x
    assert launch["counters"]["shared_wavefronts"] <= 1.02 * launch["counters"]["shared_ideal_wavefronts"]


@simulated
def test_explicit_kernels_are_read_once():
    T, D, W = 256, 1024, 4
    inputs = inputs_of("apply_dynamic_conv", ConvShape("", B=1, T=T, D=D, W=W, state=False), BF16)
    with hoppersim.simulate():
        jet_sim().apply_dynamic_conv(*inputs)
        (launch,) = hoppersim.launches()
    halo = (W - 1) * (T // 32) * D * 2
    assert launch["counters"]["global_read_bytes"] <= inputs.kernels.numel() * 2 + inputs.x.numel() * 2 + halo
    assert launch["counters"]["global_write_bytes"] == T * D * 2 + D * (W - 1) * 2


# ---- what the compiler made


@pytest.mark.parametrize("stem", ("gemm.launch", "apply.launch"))
def test_no_spills_and_no_local_memory(stem):
    for name, facts in report(f"csrc.dynamic_conv.{stem}").items():
        assert facts.spill_bytes == 0 and facts.stack_bytes == 0, name
    for name, code in disassembly(f"csrc.dynamic_conv.{stem}").items():
        assert not code.uses("LDL", "STL"), name
        if "apply" not in stem:
            assert code.uses("HGMMA") and code.uses("UTMALDG") and code.uses("STG.E.128", "STG.E.64"), name
        else:
            assert code.uses("LDG.E.128") and code.uses("STG.E.128"), name
