"""jet::prefill_gated_delta_rule: which rows of the pool it reads and writes, marks, layouts, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import prefill_properties
from support.arguments import PrefillCall, prefill_call
from support.backends import PAIRS, each_backend, each_pair
from support.comparison import assert_bitwise
from support.pool_properties import run
from support.shapes import DeltaShape, ids

import jetkernels

F32, BF16 = torch.float32, torch.bfloat16
OFFSETS = (0, 1, 66, 66, 130, 330)  # sequences of 1, 65, 0, 64 and 200 tokens
MARKS = {65: 8, 130: 9, 130 + 64: 6, 130 + 128: -3, 330: 11}
SHAPE = DeltaShape("", T=330, Hk=2, H=4, K=13, V=70, cu_seqlens=OFFSETS)


def call_of(dtype=F32, state_dtype=None, shape=SHAPE, rows=(4, 0, 7, -1, 2), goes_on=(True, False, True, True, True)):
    return prefill_call(shape, dtype, state_dtype, rows, goes_on, MARKS if shape.N == 5 else None)


@each_backend
@each_pair
def test_equals_the_reference(backend, dtype, state_dtype):
    prefill_properties.check(backend, call_of(dtype, state_dtype))


@each_backend
@pytest.mark.parametrize("goes_on", (None, (False,) * 5), ids=str)
@pytest.mark.parametrize("rows", (None, (-1,) * 5), ids=str)
def test_rows_in_order_and_none(backend, rows, goes_on):
    call = call_of(rows=rows, goes_on=goes_on)
    rows = [-1 if row < 5 else row for row in MARKS.values()]
    prefill_properties.check(backend, call._replace(mark_indices=torch.tensor(rows)))


@each_backend
@given(data=st.data())
def test_any_call(backend, data):
    dtype, state_dtype = data.draw(st.sampled_from(PAIRS))
    shape = DeltaShape(
        "",
        Hk=data.draw(st.integers(1, 2)),
        H=2 * data.draw(st.integers(1, 2)),
        K=data.draw(st.sampled_from((3, 16, 32, 64))),
        V=data.draw(st.sampled_from((1, 20, 64, 70))),
        l2norm=data.draw(st.booleans()),
    )
    prefill_properties.check(backend, data.draw(prefill_properties.calls(shape, dtype, state_dtype)))


@each_backend
@each_pair
def test_equals_the_op_without_a_pool(backend, dtype, state_dtype):
    prefill_properties.equals_the_op_without_a_pool(backend, call_of(dtype, state_dtype))


@each_backend
@pytest.mark.parametrize("state_dtype", (F32, BF16), ids=ids)
def test_properties(backend, state_dtype):
    call = call_of(F32, state_dtype)
    prefill_properties.layout_does_not_matter(backend, call)
    prefill_properties.what_nothing_names_does_not_matter(backend, call)
    prefill_properties.every_element_is_written(backend, call)


@each_backend
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
@pytest.mark.parametrize("n", (1, 4))
def test_nan_stays_in_its_sequence(backend, n, value):
    prefill_properties.nan_stays_in_its_sequence(backend, call_of(), n, value)


@each_backend
def test_pieces_equal_the_whole(backend):
    shape = SHAPE._replace(T=200, cu_seqlens=(0, 200))
    prefill_properties.pieces_equal_the_whole(backend, call_of(shape=shape, rows=[1], goes_on=[False]), 128)


@each_backend
@pytest.mark.parametrize("cu_seqlens", ((0,), (0, 0, 0)), ids=str)
def test_no_tokens(backend, cu_seqlens):
    """An empty sequence keeps its row, or makes zeros of it where it has no initial state."""
    shape = SHAPE._replace(T=0, cu_seqlens=cu_seqlens)
    N = shape.N
    call = call_of(shape=shape, rows=[1, 0][:N], goes_on=[True, False][:N])
    out, pool = run(backend, call)
    assert out.shape == call.v.shape
    expected = call.state.clone()
    if N:
        expected[0] = 0
    assert_bitwise(pool, expected, "pool")


@each_backend
def test_a_pool_without_rows(backend):
    call = call_of(rows=(-1,) * 5)
    call = call._replace(state=call.state[:0], mark_indices=torch.full((5,), -1))
    assert run(backend, call)[0].count_nonzero() == 0


@each_backend
def test_a_token_may_be_named_again_without_a_row(backend):
    call = call_of()
    again = [torch.cat([t, more]) for t, more in ((call.mark_tokens, long(65)), (call.mark_indices, long(-1)))]
    prefill_properties.check(backend, call._replace(mark_tokens=again[0], mark_indices=again[1]))


def test_the_function():
    call = call_of()
    out, pool = run(lambda op, *args: getattr(torch.ops.jet, op)(*args), call)
    names = ("state", "cu_seqlens", "state_indices", "has_initial_state", "mark_tokens", "mark_indices")
    arguments = {name: getattr(call, name) for name in names} | {"state": call.state.clone()}
    o = jetkernels.prefill_gated_delta_rule_(*call[:5], **arguments, use_qk_l2norm_in_kernel=True)
    assert_bitwise(o, out, "output")
    assert_bitwise(arguments["state"], pool, "pool")


def long(*values: int) -> torch.Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    "changes, sentence",
    (
        ({"cu_seqlens": None}, "cu_seqlens must be a Tensor, got None"),
        ({"cu_seqlens": long(0, 1, 66, 66, 130, 329)}, "cu_seqlens[5] must be T = 330, got 329"),
        ({"has_initial_state": long(1, 1, 1, 1, 1)}, "has_initial_state must be bool, got int64"),
        (
            {"has_initial_state": torch.ones(4, dtype=torch.bool)},
            "has_initial_state [N] dimension 0 must be N = 5 (from cu_seqlens), got 4",
        ),
        ({"mark_tokens": None}, "mark_tokens and mark_indices go together, got only mark_indices"),
        ({"mark_indices": None}, "mark_tokens and mark_indices go together, got only mark_tokens"),
        (
            {"mark_indices": long(8, 9)},
            "mark_indices [M] dimension 0 must be M = 5 (as in mark_tokens), got 2",
        ),
        ({"mark_indices": long(8, 9, 99, -3, 11)}, "mark_indices[2] must be below P = 12, got 99"),
        (
            {"mark_indices": long(8, 9, 2, -3, 11)},
            "mark_indices[2] must be a row that no sequence and no other mark has, got 2",
        ),
        (
            {"mark_indices": long(8, 9, 8, -3, 11)},
            "mark_indices[2] must be a row that no sequence and no other mark has, got 8",
        ),
        ({"mark_tokens": long(0, 130, 194, 258, 330)}, "mark_tokens[0] must be in 1..T = 330, got 0"),
        ({"mark_tokens": long(65, 130, 130, 258, 330)}, "mark_tokens must name each token once, got 130 again at 2"),
        (
            {"mark_tokens": long(65, 130, 195, 258, 330)},
            "mark_tokens[2] must be a multiple of 64 tokens behind the beginning of its sequence, or its end, got 195 "
            "in a sequence of 130..330",
        ),
        ({"state_indices": long(4, 4, 7, -1, 2)}, "state_indices must name each row once, got row 4 at 0 and 1"),
    ),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_wrong_arguments(changes, sentence):
    call: PrefillCall = call_of()._replace(**changes)
    before = call.state.clone()
    names = ("state", "cu_seqlens", "state_indices", "has_initial_state", "mark_tokens", "mark_indices")
    with pytest.raises(RuntimeError) as caught:
        jetkernels.prefill_gated_delta_rule_(*call[:5], **{name: getattr(call, name) for name in names})
    assert str(caught.value) == f"prefill_gated_delta_rule_: {sentence}"
    assert_bitwise(call.state, before, "pool")


def test_a_pool_that_shares_memory_is_refused():
    call = call_of()
    call = call._replace(state=call.v.flatten()[: call.state.numel()].view(call.state.shape))
    with pytest.raises(RuntimeError, match="state is written in place and must not share memory with v"):
        torch.ops.jet.prefill_gated_delta_rule(*call)
