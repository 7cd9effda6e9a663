"""jet::recurrent_gated_delta_rule against its definition, the properties of its pool, and the out-of-place function."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import pool_properties
from support.cases import (
    BACKENDS,
    DELTA_SHAPES,
    DeltaShape,
    assert_bitwise,
    assert_error,
    assert_outputs,
    backend_id,
    delta_inputs,
    delta_shapes,
    ids,
    laid_out,
    layouts,
    seeds,
    splits,
)
from support.pool_properties import RecurrentCall, run, with_rows

import jetkernels
from reference.recurrent_gated_delta_rule import gated_delta_rule

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
PAIRS = ((F64, F64), *((dtype, pool) for dtype in (F32, BF16, torch.float16) for pool in (F32, BF16)))
ROWS = (None, (0, 1, 2), (4, 0, 3), (2, -1, 0), (-1, -1, -1), (-7, 4, -1))
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=backend_id)
each_pair = pytest.mark.parametrize("dtype, pool_dtype", PAIRS, ids=lambda d: str(d).removeprefix("torch."))


def random(dtype=F32, pool_dtype=None, shape=DeltaShape("", B=3, T=1), P: int = 5, seed: int = 0) -> RecurrentCall:
    *tokens, _, _, scale, l2norm = delta_inputs(shape, dtype, seed)
    pool_dtype = pool_dtype or (F64 if dtype == F64 else F32)
    pool = torch.randn(P, shape.H, shape.K, shape.V, dtype=F64).to(pool_dtype)
    return RecurrentCall(*tokens, pool, None, scale, l2norm)


@each_backend
@each_pair
@pytest.mark.parametrize("shape", [shape for shape in DELTA_SHAPES if shape.cu_seqlens is None], ids=ids)
def test_equals_the_reference(backend, dtype, pool_dtype, shape):
    pool_properties.check(backend, random(dtype, pool_dtype, shape))


@each_backend
@each_pair
@pytest.mark.parametrize("T", (1, 3))
@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64), ids=("int32", "int64"))
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_any_rows_of_the_pool(backend, dtype, pool_dtype, T, index_dtype, rows):
    call = random(dtype, pool_dtype, DeltaShape("", B=3, T=T, K=16, V=24))
    pool_properties.check(backend, with_rows(call, rows, index_dtype))


@each_backend
@given(shape=delta_shapes(packed=False), pair=st.sampled_from(PAIRS), layouts=layouts, data=st.data(), seed=seeds)
def test_any_shape_dtype_and_layout(backend, shape, pair, layouts, data, seed):
    """The pool too may be strided."""
    call = random(*pair, shape, P=shape.B + 2, seed=seed)
    rows = data.draw(st.permutations(range(shape.B + 2)))[: shape.B]
    call = with_rows(call, [row if data.draw(st.booleans()) else -row - 1 for row in rows])
    tensors = call._fields[:7]
    other = call._replace(**{name: laid_out(getattr(call, name), layout) for name, layout in zip(tensors, layouts)})
    pool_properties.check(backend, other)
    (expected, expected_pool), pool = run(backend, call), other.pool
    out = backend("recurrent_gated_delta_rule", *other)
    assert_error("output", out, expected, 1e-6 if out.dtype in (F32, F64) else 1e-2)
    assert_error("pool", pool, expected_pool, 1e-6 if pool.dtype in (F32, F64) else 1e-2)


@each_backend
@given(data=st.data(), T=st.integers(0, 30), dtype=st.sampled_from((F32, F64)), seed=seeds)
def test_any_split_into_calls_equals_one_call(backend, data, T, dtype, seed):
    call = random(dtype, shape=DeltaShape("", B=2, T=T), P=2, seed=seed)
    whole, whole_pool = run(backend, call)
    parts, begin = [], 0
    for length in data.draw(splits(T)):
        tokens = [t[:, begin : begin + length] for t in call[:5]]
        parts.append(backend("recurrent_gated_delta_rule", *tokens, *call[5:]))
        begin += length
    assert_outputs((torch.cat(parts, 1), call.pool), (whole, whole_pool), dtype)


# ---- the pool


@each_backend
@pytest.mark.parametrize("pool_dtype", (F32, BF16), ids=ids)
def test_index_minus_one_is_not_row_zero(backend, pool_dtype):
    pool_properties.negative_index_is_not_a_row(backend, random(F32, pool_dtype))


@each_backend
@pytest.mark.parametrize("rows", ((3, 0, 1), (-1, 2, -1)), ids=str)
@pytest.mark.parametrize("pool_dtype", (F32, BF16), ids=ids)
def test_other_rows_do_not_matter(backend, pool_dtype, rows):
    pool_properties.other_rows_do_not_matter(backend, random(F32, pool_dtype), rows)


@each_backend
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
@pytest.mark.parametrize("n", range(3))
@pytest.mark.parametrize("T", (1, 3))
def test_nan_stays_in_its_sequence(backend, T, n, value):
    call = random(shape=DeltaShape("", B=3, T=T))
    pool_properties.nan_stays_in_its_sequence(backend, with_rows(call, (4, 0, 2)), n, value)


@each_backend
@each_pair
def test_rows_do_not_depend_on_others(backend, dtype, pool_dtype):
    pool_properties.rows_do_not_depend_on_others(backend, with_rows(random(dtype, pool_dtype), (4, 0, 2)))


@each_backend
def test_repeated_runs_are_equal(backend):
    pool_properties.repeated_runs_are_equal(
        backend, with_rows(random(shape=DeltaShape("", B=3, T=4, K=96, V=256)), (4, 0, 2))
    )


@each_backend
@each_pair
@pytest.mark.parametrize("rows", (None, (4, -1, 2)), ids=str)
def test_every_element_is_written(backend, dtype, pool_dtype, rows):
    pool_properties.every_element_is_written(backend, with_rows(random(dtype, pool_dtype), rows))


@each_backend
def test_updates_in_place(backend):
    pool_properties.updates_in_place(backend, random())


@each_backend
@pytest.mark.parametrize("pool_dtype", (F32, BF16), ids=ids)
def test_row_beyond_32_bits(backend, pool_dtype):
    pool_properties.row_beyond_32_bits(backend, random(F32, pool_dtype, DeltaShape("", B=2, K=64, V=64), P=2))


@each_backend
@pytest.mark.parametrize("shape", (DeltaShape("no tokens", B=2, T=0), DeltaShape("no sequences", B=0, T=3)), ids=ids)
@pytest.mark.parametrize("indexed", (False, True), ids=("rows in order", "indices"))
def test_nothing_to_do(backend, shape, indexed):
    """No token leaves the pool as it is, to the bit."""
    call = random(shape=shape)
    call = with_rows(call, range(shape.B)) if indexed else call
    out, pool = run(backend, call)
    assert out.shape == call.v.shape
    assert_bitwise(pool, call.pool, "pool")


# ---- numbers


@each_backend
def test_bf16_pool_is_rounded_once_per_call(backend):
    """Within a call the state is fp32: 64 tokens in one call equal those with an fp32 pool, rounded at the end."""
    call = random(F32, BF16, DeltaShape("", B=2, T=64), P=2)
    out, pool = run(backend, call)
    wide_out, wide_pool = run(backend, call._replace(pool=call.pool.float()))
    assert_error("output", out, wide_out, 1e-6)
    assert_error("pool", pool, wide_pool.to(BF16), 1e-4)


@each_backend
def test_long_memory_is_exact(backend):
    """g = 0: a state that nothing overwrites is kept to the bit through 500 steps."""
    call = random()
    call = call._replace(g=torch.zeros_like(call.g), beta=torch.zeros_like(call.beta))
    pool = call.pool.clone()
    for _ in range(500):
        backend("recurrent_gated_delta_rule", *call)
    assert_bitwise(call.pool, pool, "pool")


@each_backend
@pytest.mark.parametrize("g", (-104.0, -1000.0, -math.inf), ids=str)
def test_decay_that_forgets_everything(backend, g):
    call = random(shape=DeltaShape("", B=3, T=4))
    call.g[:, 1] = g
    pool_properties.check(backend, call)


@each_backend
@each_pair
def test_zero_keys_and_queries(backend, dtype, pool_dtype):
    call = random(dtype, pool_dtype)
    call.k[1], call.q[2] = 0, 0
    pool_properties.check(backend, call)


@each_backend
@pytest.mark.parametrize("signs", ((1, 1), (1, -1)), ids=("identical keys", "alternating keys"))
def test_correlated_keys_with_beta_one(backend, signs):
    call = random(shape=DeltaShape("", B=2, T=128), P=2)
    k = call.k[:, :1] * torch.tensor(signs, dtype=F32).repeat(64)[:, None, None]
    pool_properties.check(backend, call._replace(k=k, g=torch.zeros_like(call.g), beta=torch.ones_like(call.beta)))


# ---- the out-of-place function


@pytest.mark.parametrize("state", (True, False), ids=("state", "no state"))
@pytest.mark.parametrize("T", (0, 1, 5, 70))
def test_fused_recurrent_equals_the_reference_and_keeps_its_arguments(T, state):
    inputs = delta_inputs(DeltaShape("", B=2, T=T, state=state), F32)
    q, k, v, g, beta, S, _, scale, l2norm = inputs
    before = None if S is None else S.clone()
    outs = jetkernels.fused_recurrent_gated_delta_rule(q, k, v, g, beta, None, S, True, l2norm)
    assert_outputs(outs, gated_delta_rule(*inputs), F32)
    if S is not None:
        assert_bitwise(S, before, "initial_state")
    assert (
        jetkernels.fused_recurrent_gated_delta_rule(q, k, v, g, beta, scale, S, use_qk_l2norm_in_kernel=l2norm)[1]
        is None
    )


def test_fused_recurrent_is_differentiable():
    inputs = delta_inputs(DeltaShape("", T=5, H=1, K=3, V=2), F64)
    leaves = [t.requires_grad_() for t in inputs[:6]]

    def function(q, k, v, g, beta, S):
        return jetkernels.fused_recurrent_gated_delta_rule(q, k, v, g, beta, 0.5, S, True, True)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_fused_recurrent_takes_packed_sequences():
    inputs = delta_inputs(DeltaShape("", T=9, cu_seqlens=(0, 0, 4, 9)), F32)
    q, k, v, g, beta, S, cu_seqlens, _, _ = inputs
    outs = jetkernels.fused_recurrent_gated_delta_rule(q, k, v, g, beta, None, S, True, True, cu_seqlens)
    assert_outputs(outs, gated_delta_rule(*inputs), F32)
