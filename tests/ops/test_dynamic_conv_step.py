"""jet::dynamic_conv_step against its definition. Its pool: test_pool_ops.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import pool_properties
from support.arguments import StepCall, step_call, with_rows
from support.backends import each_backend, each_dtype
from support.comparison import DTYPES, assert_bitwise, assert_error
from support.layouts import with_layouts
from support.pool_properties import run
from support.shapes import CONV_SHAPES, ROWS, ConvShape, ids
from support.strategies import layouts, seeds

F32, F64 = torch.float32, torch.float64
SHAPES = tuple(shape for shape in CONV_SHAPES if shape.cu_seqlens is None and not shape.reason.startswith("T ="))


def random(dtype: torch.dtype = F32, B: int = 3, P: int = 5, seed: int = 0, **shape) -> StepCall:
    return step_call(ConvShape("", B=B, **shape), dtype, P=P, seed=seed)


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_equals_the_reference(backend, dtype, shape):
    pool_properties.check(backend, step_call(shape._replace(B=3), dtype))


@each_backend
@each_dtype
@pytest.mark.parametrize("N", (1, 2, 11, 12, 13, 24, 25, 33))
def test_any_number_of_sequences(backend, dtype, N):
    pool_properties.check(backend, random(dtype, N, N, D=37, R=19))


@each_backend
@each_dtype
@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64), ids=("int32", "int64"))
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_any_rows_of_the_pool(backend, dtype, index_dtype, rows):
    pool_properties.check(backend, with_rows(random(dtype), rows, index_dtype))


@each_backend
@given(
    N=st.integers(1, 30),
    D=st.integers(1, 70),
    R=st.integers(1, 40),
    W=st.integers(2, 4),
    bias=st.booleans(),
    silu=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    layouts=layouts,
    data=st.data(),
    seed=seeds,
)
def test_any_shape_dtype_and_layout(backend, N, D, R, W, bias, silu, dtype, layouts, data, seed):
    """The pool too may be strided."""
    call = random(dtype, N, N + 2, seed, D=D, R=R, W=W, bias=bias, silu=silu)
    rows = data.draw(st.permutations(range(N + 2)))[:N]
    call = with_rows(call, [row if data.draw(st.booleans()) else -row - 1 for row in rows])
    other = with_layouts(call, layouts)
    pool_properties.check(backend, other)
    expected, expected_pool = run(backend, call)
    out = backend("dynamic_conv_step", *other)
    assert_error("output", out, expected, 1e-6 if dtype in (F32, F64) else 1e-2)
    assert_bitwise(other.conv_state, expected_pool, "pool")


@each_backend
@pytest.mark.parametrize("W", (2, 3, 4))
def test_the_state_is_shifted_and_takes_the_new_input(backend, W):
    call = random(W=W, P=3)
    _, pool = run(backend, call)
    assert_bitwise(pool, torch.cat([call.conv_state[..., 1:], call.x[..., None]], -1), "conv_state")
