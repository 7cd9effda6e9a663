"""jet::dynamic_conv_step against its definition, and the properties of its pool."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import pool_properties
from support.cases import (
    BACKENDS,
    CONV_SHAPES,
    DTYPES,
    ConvShape,
    assert_bitwise,
    assert_error,
    backend_id,
    conv_inputs,
    ids,
    laid_out,
    layouts,
    seeds,
)
from support.pool_properties import StepCall, run, with_rows

F32, F64 = torch.float32, torch.float64
ROWS = (None, (0, 1, 2), (4, 0, 3), (2, -1, 0), (-1, -1, -1), (-7, 4, -1))
SHAPES = tuple(shape for shape in CONV_SHAPES if shape.cu_seqlens is None and not shape.reason.startswith("T ="))
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=backend_id)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)


def random(dtype: torch.dtype = F32, seed: int = 0, P: int = 5, N: int = 3, **shape) -> StepCall:
    x, hidden, weight, bias, _, _, silu = conv_inputs(ConvShape("", **shape)._replace(B=N, T=1), dtype, seed)
    D = x.shape[2]
    pool = torch.randn(P, D, weight.shape[0] // D - 1, dtype=F64).to(dtype)
    return StepCall(x[:, 0], hidden[:, 0], weight, bias, pool, None, silu)


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_equals_the_reference(backend, dtype, shape):
    fields = shape._asdict()
    for name in ("reason", "B", "T"):
        del fields[name]
    pool_properties.check(backend, random(dtype, **fields))


@each_backend
@each_dtype
@pytest.mark.parametrize("N", (1, 2, 11, 12, 13, 24, 25, 33))
def test_any_number_of_sequences(backend, dtype, N):
    pool_properties.check(backend, random(dtype, N=N, P=N, D=37, R=19))


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
    call = random(dtype, seed, N + 2, N, D=D, R=R, W=W, bias=bias, silu=silu)
    rows = data.draw(st.permutations(range(N + 2)))[:N]
    call = with_rows(call, [row if data.draw(st.booleans()) else -row - 1 for row in rows])
    tensors = [name for name, t in call._asdict().items() if isinstance(t, torch.Tensor)]
    other = call._replace(**{name: laid_out(getattr(call, name), layout) for name, layout in zip(tensors, layouts)})
    pool_properties.check(backend, other)
    expected, expected_pool = run(backend, call)
    out = backend("dynamic_conv_step", *other)
    assert_error("output", out, expected, 1e-6 if dtype in (F32, F64) else 1e-2)
    assert_bitwise(other.pool, expected_pool, "pool")


@each_backend
@pytest.mark.parametrize("W", (2, 3, 4))
def test_the_state_is_shifted_and_takes_the_new_input(backend, W):
    call = random(W=W, P=3)
    _, pool = run(backend, call)
    assert_bitwise(pool, torch.cat([call.pool[..., 1:], call.x[..., None]], -1), "conv_state")


# ---- the pool


@each_backend
@each_dtype
def test_index_minus_one_is_not_row_zero(backend, dtype):
    pool_properties.negative_index_is_not_a_row(backend, random(dtype))


@each_backend
@pytest.mark.parametrize("rows", ((3, 0, 1), (-1, 2, -1)), ids=str)
@each_dtype
def test_other_rows_do_not_matter(backend, dtype, rows):
    pool_properties.other_rows_do_not_matter(backend, random(dtype), rows)


@each_backend
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
@pytest.mark.parametrize("n", range(3))
def test_nan_stays_in_its_sequence(backend, n, value):
    pool_properties.nan_stays_in_its_sequence(backend, with_rows(random(D=33), (4, 0, 2)), n, value)


@each_backend
@each_dtype
def test_rows_do_not_depend_on_others(backend, dtype):
    pool_properties.rows_do_not_depend_on_others(backend, with_rows(random(dtype), (4, 0, 2)))


@each_backend
def test_repeated_runs_are_equal(backend):
    pool_properties.repeated_runs_are_equal(backend, with_rows(random(D=300, R=40), (4, 0, 2)))


@each_backend
@each_dtype
@pytest.mark.parametrize("rows", (None, (4, -1, 2)), ids=str)
def test_every_element_is_written(backend, dtype, rows):
    pool_properties.every_element_is_written(backend, with_rows(random(dtype, D=37), rows))


@each_backend
def test_updates_in_place(backend):
    pool_properties.updates_in_place(backend, random())


@each_backend
def test_row_beyond_32_bits(backend):
    pool_properties.row_beyond_32_bits(backend, random(torch.bfloat16, D=4096, N=2, P=2, R=2))


@each_backend
@pytest.mark.parametrize("indexed", (False, True), ids=("rows in order", "indices"))
def test_nothing_to_do(backend, indexed):
    """No sequence leaves the pool as it is, to the bit."""
    call = random(N=0)
    out, pool = run(backend, with_rows(call, []) if indexed else call)
    assert out.shape == (0, 12)
    assert_bitwise(pool, call.pool, "pool")
