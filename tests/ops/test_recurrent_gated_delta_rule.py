"""jet::recurrent_gated_delta_rule against its definition, and the out-of-place function. Its pool: test_pool_ops.py."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import pool_properties
from support.arguments import RecurrentCall, delta_inputs, recurrent_call, with_rows
from support.backends import PAIRS, each_backend, each_pair
from support.comparison import assert_bitwise, assert_error, assert_outputs
from support.layouts import with_layouts
from support.pool_properties import run
from support.shapes import DELTA_SHAPES, ROWS, DeltaShape, ids
from support.strategies import delta_shapes, layouts, seeds, splits

import jetkernels
from reference.recurrent_gated_delta_rule import gated_delta_rule

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def random(dtype=F32, state_dtype=None, shape=DeltaShape("", B=3, T=1), **more) -> RecurrentCall:
    return recurrent_call(shape, dtype, state_dtype, **more)


@each_backend
@each_pair
@pytest.mark.parametrize("shape", [shape for shape in DELTA_SHAPES if shape.cu_seqlens is None], ids=ids)
def test_equals_the_reference(backend, dtype, state_dtype, shape):
    pool_properties.check(backend, random(dtype, state_dtype, shape))


@each_backend
@each_pair
@pytest.mark.parametrize("T", (1, 3))
@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64), ids=("int32", "int64"))
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_any_rows_of_the_pool(backend, dtype, state_dtype, T, index_dtype, rows):
    call = random(dtype, state_dtype, DeltaShape("", B=3, T=T, K=16, V=24))
    pool_properties.check(backend, with_rows(call, rows, index_dtype))


@each_backend
@given(shape=delta_shapes(packed=False), pair=st.sampled_from(PAIRS), layouts=layouts, data=st.data(), seed=seeds)
def test_any_shape_dtype_and_layout(backend, shape, pair, layouts, data, seed):
    """The pool too may be strided."""
    call = random(*pair, shape, seed=seed)
    rows = data.draw(st.permutations(range(shape.B + 2)))[: shape.B]
    call = with_rows(call, [row if data.draw(st.booleans()) else -row - 1 for row in rows])
    other = with_layouts(call, layouts)
    pool_properties.check(backend, other)
    (expected, expected_pool), pool = run(backend, call), other.state
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
    assert_outputs((torch.cat(parts, 1), call.state), (whole, whole_pool), dtype)


# ---- numbers


@each_backend
def test_bf16_pool_is_rounded_once_per_call(backend):
    """Within a call the state is fp32: 64 tokens in one call equal those with an fp32 pool, rounded at the end."""
    call = random(F32, BF16, DeltaShape("", B=2, T=64), P=2)
    out, pool = run(backend, call)
    wide_out, wide_pool = run(backend, call._replace(state=call.state.float()))
    assert_error("output", out, wide_out, 1e-6)
    assert_error("pool", pool, wide_pool.to(BF16), 1e-4)


@each_backend
def test_long_memory_is_exact(backend):
    """g = 0: a state that nothing overwrites is kept to the bit through 500 steps."""
    call = random()
    call = call._replace(g=torch.zeros_like(call.g), beta=torch.zeros_like(call.beta))
    pool = call.state.clone()
    for _ in range(500):
        backend("recurrent_gated_delta_rule", *call)
    assert_bitwise(call.state, pool, "pool")


@each_backend
@pytest.mark.parametrize("g", (-104.0, -1000.0, -math.inf), ids=str)
def test_decay_that_forgets_everything(backend, g):
    call = random(shape=DeltaShape("", B=3, T=4))
    call.g[:, 1] = g
    pool_properties.check(backend, call)


@each_backend
@each_pair
def test_zero_keys_and_queries(backend, dtype, state_dtype):
    call = random(dtype, state_dtype)
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
