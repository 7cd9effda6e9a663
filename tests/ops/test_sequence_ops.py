"""The three ops over whole sequences against their definitions, and the properties that each of them must have."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import sequence_properties as properties
from support.arguments import cotangents, inputs_of
from support.backends import check_gradients, check_outputs, each_backend, each_dtype
from support.comparison import DTYPES, assert_outputs
from support.layouts import with_layouts
from support.shapes import CONV_SHAPES, DELTA_SHAPES, PACKED, ConvShape, DeltaShape, ids
from support.strategies import conv_shapes, delta_shapes, layouts, seeds, splits

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


class Sizes(NamedTuple):
    """What the tests of one op take; a packed shape is one of B = 1 with cu_seqlens."""

    shapes: tuple  # with a reason each
    drawn: Callable[..., st.SearchStrategy]  # any shape
    short: object  # one call, its rows cut anywhere
    longest: int  # tokens of a call that is cut
    long: object  # rows or packed sequences of 200 tokens
    few: object  # rows of few tokens
    one_output: tuple[int, ...]  # tokens where only one output has a cotangent
    packed: tuple[int, ...]  # three sequences
    gradcheck: tuple
    nothing: tuple
    written: tuple  # of every_element_is_written


DELTA = Sizes(
    shapes=DELTA_SHAPES,
    drawn=delta_shapes,
    short=DeltaShape("", B=2),
    longest=200,
    long=DeltaShape("", T=200),
    few=DeltaShape("", B=2),
    one_output=(1, 64, 65),
    packed=(0, 5, 70, 141),
    gradcheck=(
        DeltaShape("short, GVA", B=2, T=5, Hk=1, H=2, K=3, V=2),
        DeltaShape("two chunks", T=66, H=1, K=2, V=2, l2norm=False),
        DeltaShape("packed", T=9, H=1, K=3, V=2, cu_seqlens=(0, 0, 2, 9, 9)),
    ),
    nothing=(
        DeltaShape("no tokens", B=2, T=0),
        DeltaShape("no rows", B=0, T=5),
        DeltaShape("no sequences", T=0, cu_seqlens=(0,)),
        DeltaShape("empty sequences only", T=0, cu_seqlens=(0, 0, 0)),
        DeltaShape("no tokens, no state", B=2, T=0, state=False),
        DeltaShape("empty sequences only, no state", T=0, cu_seqlens=(0, 0, 0), state=False),
    ),
    written=(*DELTA_SHAPES[:3], *DELTA_SHAPES[-2:], DeltaShape("ragged", B=3, T=70, K=13, V=7)),
)
CONV = Sizes(
    shapes=CONV_SHAPES,
    drawn=conv_shapes,
    short=ConvShape(""),
    longest=40,
    long=ConvShape("", B=1, T=200, D=96, R=24),
    few=ConvShape("", D=33),
    one_output=(1, 2, 20),
    packed=(0, 5, 6, 20),
    gradcheck=tuple(
        ConvShape(f"W = {W}, {'packed' if cu else 'rows'}, silu = {silu}", 1 if cu else 2, 7, 3, 2, W, cu, silu)
        for W in (2, 3, 4)
        for cu in (None, (0, 0, 2, 7, 7))
        for silu in (True, False)
    ),
    nothing=(
        ConvShape("no tokens", T=0),
        ConvShape("no rows", B=0),
        ConvShape("no sequences", B=1, T=0, cu_seqlens=(0,)),
        ConvShape("empty sequences only", B=1, T=0, cu_seqlens=(0, 0, 0)),
        ConvShape("no tokens, no state", T=0, state=False),
        ConvShape("empty sequences only, no state", B=1, T=0, cu_seqlens=(0, 0, 0), state=False),
    ),
    written=(*CONV_SHAPES[:3], *CONV_SHAPES[-6:]),
)
WITH_BIAS = tuple(shape for shape in CONV_SHAPES if shape.bias)  # apply_dynamic_conv has none
SIZES = {
    "chunk_gated_delta_rule": DELTA,
    "dynamic_conv": CONV,
    "apply_dynamic_conv": CONV._replace(shapes=WITH_BIAS),
}
each_op = pytest.mark.parametrize("op", SIZES)
each_integer = pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64), ids=ids)


def each(field: str):
    """Every op with each of its ``field``."""
    cases = [(op, case) for op, sizes in SIZES.items() for case in getattr(sizes, field)]
    names = [f"{op}-{getattr(case, 'reason', case)}" for op, case in cases]
    return pytest.mark.parametrize("op, case", cases, ids=names)


def rows_or_packed(shape, B: int, cu_seqlens: tuple[int, ...] | None):
    """``shape`` with B rows, or with the packed sequences of ``cu_seqlens``."""
    return shape._replace(B=B) if cu_seqlens is None else shape._replace(B=1, T=cu_seqlens[-1], cu_seqlens=cu_seqlens)


# ---- equals the reference


@each_backend
@each_dtype
@each("shapes")
def test_equals_the_reference(backend, dtype, op, case):
    """T <= 64, K != V and V = 256 with K = 96 among those of the delta rule: training there fails elsewhere."""
    check_outputs(backend, op, inputs_of(op, case, dtype))


@each_backend
@each_dtype
@each("shapes")
def test_gradients_equal_fp64_differentiation(backend, dtype, op, case):
    check_gradients(backend, op, inputs_of(op, case, dtype))


@each_backend
@each_op
@given(data=st.data(), dtype=st.sampled_from(DTYPES), layouts=layouts, seed=seeds)
def test_any_shape_dtype_and_layout(backend, op, data, dtype, layouts, seed):
    inputs = inputs_of(op, data.draw(SIZES[op].drawn()), dtype, seed)
    other = with_layouts(inputs, layouts)
    check_outputs(backend, op, other)
    check_gradients(backend, op, other)
    assert_outputs(backend(op, *other), backend(op, *inputs), dtype)


@each_backend
@pytest.mark.parametrize("which", ("output", "state"))
@each("one_output")
def test_gradient_of_one_output_alone(backend, which, op, case):
    inputs = inputs_of(op, SIZES[op].few._replace(T=case))
    out, S = cotangents(inputs)
    check_gradients(backend, op, inputs, (out, None) if which == "output" else (torch.zeros_like(out), S))


@each_backend
@each_integer
@each_op
def test_offsets_of_either_integer_dtype(backend, index_dtype, op):
    inputs = inputs_of(op, SIZES[op].few._replace(B=1, T=200, cu_seqlens=PACKED))
    inputs = inputs._replace(cu_seqlens=inputs.cu_seqlens.to(index_dtype))
    check_outputs(backend, op, inputs)
    check_gradients(backend, op, inputs)


@each("gradcheck")
def test_gradcheck(op, case):
    """torch's own finite differences, for every differentiable input, the state included."""
    inputs = inputs_of(op, case, F64)
    before = inputs._fields.index("cu_seqlens")
    leaves = [t.requires_grad_() for t in inputs[:before]]
    call = getattr(torch.ops.jet, op)
    fast = op == "chunk_gated_delta_rule"  # whose two chunks have many numbers
    assert torch.autograd.gradcheck(lambda *t: call(*t, *inputs[before:]), leaves, fast_mode=fast)


# ---- calls, rows and sequences


@each_backend
@each_op
@given(data=st.data(), seed=seeds)
def test_any_split_into_calls_equals_one_call(backend, op, data, seed):
    T = data.draw(st.integers(0, SIZES[op].longest))
    shape = SIZES[op].short._replace(T=T)
    if "conv" in op:
        shape = shape._replace(W=data.draw(st.integers(2, 4)))
    properties.any_split_equals_one_call(backend, op, inputs_of(op, shape, F32, seed), data.draw(splits(T)))


@each_backend
@each_op
@given(data=st.data(), dtype=st.sampled_from((F32, F64)), seed=seeds)
def test_packed_equals_separate(backend, op, data, dtype, seed):
    """Nothing leaks from one sequence into the next, forward or backward; empty sequences break no index table."""
    shape = data.draw(SIZES[op].drawn(packed=True))
    properties.packed_equals_separate(backend, op, inputs_of(op, shape, dtype, seed))


@each_backend
@each_dtype
@each_op
def test_rows_do_not_depend_on_others(backend, dtype, op):
    properties.rows_do_not_depend_on_others(backend, op, inputs_of(op, SIZES[op].short._replace(B=5), dtype))


@each_backend
@pytest.mark.parametrize("cu_seqlens", (None, PACKED), ids=("rows", "packed"))
@each_op
def test_repeated_runs_are_equal(backend, cu_seqlens, op):
    properties.repeated_runs_are_equal(backend, op, inputs_of(op, rows_or_packed(SIZES[op].long, 3, cu_seqlens)))


@each_backend
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
@pytest.mark.parametrize("n", range(3))
@pytest.mark.parametrize("packed", (False, True), ids=("rows", "packed"))
@each_op
def test_nan_stays_in_its_sequence(backend, op, packed, n, value):
    inputs = inputs_of(op, rows_or_packed(SIZES[op].few, 3, SIZES[op].packed if packed else None))
    properties.nan_stays_in_its_sequence(backend, op, inputs, n, value)


@each_backend
@each("nothing")
def test_nothing_to_do(backend, op, case):
    properties.nothing_to_do(backend, op, inputs_of(op, case))


# ---- memory


@each_backend
@each_dtype
@each("written")
def test_every_element_is_written(backend, dtype, op, case):
    properties.every_element_is_written(backend, op, inputs_of(op, case, dtype))


@each_backend
@each_op
def test_arguments_stay_as_they_are(backend, op):
    properties.arguments_stay_as_they_are(backend, op, inputs_of(op, SIZES[op].short))


@each_backend
@pytest.mark.parametrize("dim", (0, 1), ids=("rows", "tokens"))
@each_op
def test_strides_beyond_32_bits(backend, dim, op):
    properties.strides_beyond_32_bits(backend, op, inputs_of(op, SIZES[op].short._replace(T=3), BF16), dim)
