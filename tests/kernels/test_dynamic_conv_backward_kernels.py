"""The Hopper kernels of the convolution's backward ops: their properties on the simulator and on a GPU, their cost,
their machine code.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import sequence_properties
from support.arguments import cotangents, inputs_of
from support.backends import check_gradients
from support.comparison import assert_bitwise
from support.device_backends import assert_every_schedule_agrees, each_device, hoppersim, simulated
from support.jet_sim import jet_sim
from support.kernel_code import disassembly, report
from support.layouts import with_layouts
from support.shapes import PACKED, ConvShape, ids
from support.strategies import layouts, seeds

BF16, F16 = torch.bfloat16, torch.float16
each_dtype = pytest.mark.parametrize("dtype", (BF16, F16), ids=ids)
each_op = pytest.mark.parametrize("op", ("dynamic_conv", "apply_dynamic_conv"))

SHAPES = (
    *(
        ConvShape(f"T = {T}", B=1, T=T, D=32, R=64)
        for T in (1, 2, 3, 4, 31, 33, 63, 64, 65, 124, 125, 126, 128, 131, 257)
    ),
    *(ConvShape(f"W = {W}", B=2, T=70, D=72, R=72, W=W) for W in (2, 3, 4)),
    *(ConvShape(f"D = {D}", B=1, T=20, D=D, R=16) for D in (8, 24, 40, 256, 264)),
    *(ConvShape(f"R = {R}", B=1, T=140, D=40, R=R) for R in (8, 56, 64, 136, 384, 512, 520, 1032)),
    ConvShape("a batch of short rows: a tile has many of them", B=50, T=7, D=32, R=64),
    ConvShape("several channel tiles in a CTA, the warpgroups in turns", B=1, T=1000, D=1256, R=72),
    *(ConvShape(f"tokens for every multiprocessor, R = {R}", B=1, T=8300, D=40, R=R) for R in (384, 512)),
    ConvShape("without bias, without activation", B=2, T=30, D=32, R=64, bias=False, silu=False),
    ConvShape("without state", B=3, T=30, D=32, R=64, state=False),
    ConvShape("packed, empty sequences among them", B=1, T=200, D=40, R=64, cu_seqlens=PACKED),
    ConvShape("packed, W = 2, without state", B=1, T=200, D=32, R=64, W=2, cu_seqlens=PACKED, state=False),
    ConvShape("packed, W = 3", B=1, T=200, D=32, R=64, W=3, cu_seqlens=PACKED),
    ConvShape("packed, many single tokens", B=1, T=150, D=32, R=64, cu_seqlens=tuple(range(151))),
    ConvShape("sequences shorter than the window", B=1, T=150, D=32, R=64, cu_seqlens=(*range(0, 149, 2), 150)),
    ConvShape("only empty sequences", B=1, T=0, D=32, R=64, cu_seqlens=(0, 0, 0)),
    ConvShape("no tokens", B=2, T=0, D=32, R=64),
    ConvShape("no tokens, without state", B=2, T=0, D=32, R=64, state=False),
)
AGREE = ("T = 64", "T = 257", "W = 3", "R = 520", "packed, empty sequences among them")
PACKED_SHAPE = ConvShape("", B=1, T=200, D=40, R=64, cu_seqlens=PACKED)


@each_device
@each_op
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_equals_differentiation_in_fp64(backend, op, dtype, shape):
    check_gradients(backend, op, inputs_of(op, shape, dtype))


@each_device
@each_op
@pytest.mark.parametrize("given_grads", (0, 1), ids=("y alone", "the state alone"))
def test_cotangents_may_be_missing(backend, op, given_grads):
    inputs = inputs_of(op, PACKED_SHAPE, BF16)
    grad_y, grad_state = cotangents(inputs)
    grads = (grad_y, None) if given_grads == 0 else (torch.zeros_like(grad_y), grad_state)
    check_gradients(backend, op, inputs, grads)


@st.composite
def shapes(draw) -> ConvShape:
    T = draw(st.integers(0, 300))
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
@settings(max_examples=25)
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
    check_gradients(backend, op, with_layouts(inputs, layouts))


@each_device
@each_op
def test_any_layout_of_the_cotangents(backend, op):
    inputs = inputs_of(op, PACKED_SHAPE, BF16)
    grads = cotangents(inputs)
    laid = tuple(torch.stack((grad, torch.full_like(grad, math.nan)), -1)[..., 0] for grad in grads)
    expected = backend.gradients(op, inputs, grads)
    for name, grad in backend.gradients(op, inputs, laid).items():
        assert_bitwise(grad, expected[name], f"d{name}")


@each_device
@each_op
def test_packed_equals_separate(backend, op):
    """What belongs to a token or to a sequence to the bit; dweight and dbias are sums over all."""
    inputs = inputs_of(op, PACKED_SHAPE, BF16)
    grads = cotangents(inputs)
    packed = backend.gradients(op, inputs, grads)
    for n, here, alone in sequence_properties.sequences(inputs):
        if alone[0].numel() == 0:
            continue
        for name, grad in backend.gradients(op, alone, (grads[0][:, here], grads[1][n : n + 1])).items():
            if name in ("weight", "bias"):
                continue
            part = packed[name][n : n + 1] if name == "conv_state" else packed[name][:, here]
            assert_bitwise(part, grad, f"d{name} of sequence {n}")


@each_device
@each_op
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
@pytest.mark.parametrize("n", (1, 5, 6))
def test_nan_stays_in_its_sequence(backend, op, n, value):
    inputs = inputs_of(op, PACKED_SHAPE, BF16)
    sequence_properties.nan_stays_in_its_sequence(backend, op, inputs, n, value)


@each_device
@each_op
def test_every_element_is_written_and_runs_repeat(backend, op):
    inputs = inputs_of(op, PACKED_SHAPE, BF16)
    sequence_properties.every_element_is_written(backend, op, inputs)
    sequence_properties.repeated_runs_are_equal(backend, op, inputs)
    sequence_properties.arguments_stay_as_they_are(backend, op, inputs)


@simulated
@each_op
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.reason in AGREE], ids=ids)
def test_every_schedule_agrees(op, shape):
    inputs = inputs_of(op, shape, BF16)
    grads = cotangents(inputs)
    assert_every_schedule_agrees(lambda backend: tuple(backend.gradients(op, inputs, grads).values()))


# ---- cost, counted by the simulator


MODELS = (("2B", 3072, 384), ("4B", 4096, 512))


def rows_of_tiles(T: int, tiles: int, stride: int, first: int, rows: int) -> int:
    """Rows that boxes of `rows` tokens read, the box of tile i from token i stride + first on."""
    return sum(max(0, min(T, i * stride + first + rows) - max(0, i * stride + first)) for i in range(tiles))


@simulated
@pytest.mark.parametrize("name, D, R", MODELS, ids=lambda v: v if isinstance(v, str) else "")
def test_costs_three_products(name, D, R):
    """Nothing of [T, D, W] in memory, weights and hidden shared by pairs of CTAs, everything else once a part; next to
    no bank conflict.
    """
    T, W, halo = 512, 4, 3
    inputs = inputs_of("dynamic_conv", ConvShape("", B=1, T=T, D=D, R=R, state=False), BF16)
    with hoppersim.simulate():
        jet_sim().dynamic_conv_backward(*cotangents(inputs), *inputs)
        passes = hoppersim.launches()
    dz_dx, dhidden, dweight = passes  # no split of the tokens
    product, weight = 2 * T * D * W * R, D * W * R * 2

    tiles, parts, _ = dz_dx["grid"]
    assert tiles == 6, "125 tokens a tile, two tiles a cluster"
    own, x_rows = rows_of_tiles(T, tiles, 125, 0, 128), rows_of_tiles(T, tiles, 125, -halo, 132)
    assert dz_dx["counters"]["tensor_flop"] == product * tiles * 128 // T
    assert dz_dx["counters"]["bulk_read_bytes"] == (parts * own * R * 2 + weight * tiles // 2 + (x_rows + own) * D * 2)
    assert dz_dx["counters"]["global_write_bytes"] == 2 * T * D * 2 + T * 8 + D * (W - 1) * 2

    tiles, parts, _ = dhidden["grid"]
    assert dhidden["counters"]["tensor_flop"] == product
    assert dhidden["counters"]["bulk_read_bytes"] == (
        weight * tiles // 2 + parts * (2 * T + halo * (tiles - 1)) * D * 2
    )
    assert dhidden["counters"]["global_write_bytes"] == T * R * 2

    ctas, parts, _ = dweight["grid"]
    assert dweight["counters"]["tensor_flop"] == product
    assert dweight["counters"]["bulk_read_bytes"] == (
        ctas // 2 * T * R * 2 + parts * (2 * T + halo * (T // 64 - 1)) * D * 2
    )
    assert dweight["counters"]["global_write_bytes"] == weight + D * W * 2

    for one in passes:
        assert one["counters"]["shared_wavefronts"] <= 1.03 * one["counters"]["shared_ideal_wavefronts"]


@simulated
def test_tokens_are_split_where_there_are_few_channels():
    inputs = inputs_of("dynamic_conv", ConvShape("", B=1, T=1000, D=32, R=64), BF16)
    with hoppersim.simulate():
        jet_sim().dynamic_conv_backward(*cotangents(inputs), *inputs)
        passes = hoppersim.launches()
    assert len(passes) == 4 and passes[2]["grid"][2] > 1


@simulated
def test_explicit_kernels_are_read_and_written_once():
    T, D, W = 256, 1024, 4
    inputs = inputs_of("apply_dynamic_conv", ConvShape("", B=1, T=T, D=D, W=W, state=False), BF16)
    with hoppersim.simulate():
        jet_sim().apply_dynamic_conv_backward(*cotangents(inputs), *inputs)
        (launch,) = hoppersim.launches()
    counters, tiles = launch["counters"], T // 128
    halo = (W - 1) * D * 2 * ((tiles - 1) * (W + 2) + T // 32 - 1)  # all behind a tile; x before a run
    state = D * (W - 1) * 2
    assert counters["global_read_bytes"] == T * D * (W + 2) * 2 + halo + state
    assert counters["global_write_bytes"] == T * D * (W + 1) * 2 + state
    assert counters["shared_wavefronts"] == counters["shared_ideal_wavefronts"]


# ---- what the compiler made


@pytest.mark.parametrize(
    "stem", ("apply.backward", "gemm.backward_inputs", "gemm.backward_hidden", "gemm.backward_weight")
)
def test_no_spills_and_no_local_memory(stem):
    for name, facts in report(f"csrc.dynamic_conv.{stem}").items():
        assert facts.spill_bytes == 0 and facts.stack_bytes == 0, name
    for name, code in disassembly(f"csrc.dynamic_conv.{stem}").items():
        assert not code.uses("LDL", "STL"), name
        assert code.uses("STG.E.128"), name
        if "reduce" in name:
            continue
        if "apply" in stem:
            assert code.uses("LDG.E.128"), name
        else:
            assert code.uses("HGMMA") and code.uses("UTMALDG"), name
        if stem in ("gemm.backward_hidden", "gemm.backward_weight"):
            assert code.uses("HMUL2"), name
