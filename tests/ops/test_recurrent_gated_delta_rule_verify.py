"""jet::recurrent_gated_delta_rule_verify and _commit: definitions, agreement with recurrent_gated_delta_rule,
properties.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import draft_properties
from support.arguments import RecurrentCall, recurrent_call, some_prefixes, with_rows
from support.backends import OPS, PAIRS, PLAIN, each_backend, each_pair
from support.comparison import assert_bitwise, assert_error
from support.draft_properties import Draft, commit, verify
from support.layouts import with_layouts
from support.shapes import DELTA_SHAPES, DeltaShape, ids
from support.strategies import delta_shapes, layouts, seeds

import jetkernels

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SHAPES = [
    shape for shape in DELTA_SHAPES if shape.cu_seqlens is None and (shape.T < 20 or not shape.reason.startswith("T ="))
]
DRAFT = DeltaShape("", B=3, T=5, Hk=2, H=4, K=13, V=70)


def random(dtype=F32, state_dtype=None, shape=DRAFT, **more) -> RecurrentCall:
    return recurrent_call(shape, dtype, state_dtype, **more)


# ---- numbers


@each_backend
@each_pair
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_equals_the_reference(backend, dtype, state_dtype, shape):
    draft_properties.check(backend, random(dtype, state_dtype, shape), some_prefixes(shape))


@each_backend
@each_pair
@pytest.mark.parametrize("T", (1, 4))
@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64), ids=("int32", "int64"))
@pytest.mark.parametrize("rows", (None, (4, 0, 3), (2, -1, 0), (-7, 4, -1)), ids=str)
def test_any_rows_of_the_pool(backend, dtype, state_dtype, T, index_dtype, rows):
    call = random(dtype, state_dtype, DRAFT._replace(T=T))
    draft_properties.check(backend, with_rows(call, rows, index_dtype), [T, T, T // 2], index_dtype)


@each_backend
@each_pair
@pytest.mark.parametrize("count", range(6))
def test_any_number_of_accepted_tokens_equals_one_call(backend, dtype, state_dtype, count):
    for shape in (DRAFT, DRAFT._replace(K=96, V=64)):
        call = with_rows(random(dtype, state_dtype, shape), (4, -1, 0))
        draft_properties.accepted_prefix_equals_one_call(backend, call, [count, 3, 5 - count])


@each_backend
@given(shape=delta_shapes(packed=False), pair=st.sampled_from(PAIRS), layouts=layouts, data=st.data(), seed=seeds)
def test_any_shape_dtype_and_layout(backend, shape, pair, layouts, data, seed):
    """The pool too may be strided. keys and updates may not."""
    call = random(*pair, shape, seed=seed)
    rows = data.draw(st.permutations(range(shape.B + 2)))[: shape.B]
    call = with_rows(call, [row if data.draw(st.booleans()) else -row - 1 for row in rows])
    accepted = [data.draw(st.integers(0, shape.T)) for _ in rows]
    other = with_layouts(call, layouts)
    draft_properties.check(backend, other, accepted)
    # torch sums a strided row for the l2norm in an order that depends on the number of tokens
    draft_properties.accepted_prefix_equals_one_call(backend, other, accepted, bitwise=not backend.is_plain)


@each_backend
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    data=st.data(),
    pair=st.sampled_from(PAIRS[:2]),
    seed=seeds,
)
def test_drafts_one_after_the_other_equal_one_call(backend, lengths, data, pair, seed):
    """Drafts of any lengths, of which every sequence accepts some tokens and drafts again from the first rejected
    one.
    """
    call = random(*pair, DeltaShape("", B=2, T=sum(lengths)), P=2, seed=seed)
    begins = [0, 0]
    for length in lengths:
        tokens = [torch.stack([t[n, begin : begin + length] for n, begin in enumerate(begins)]) for t in call[:5]]
        part = RecurrentCall(*tokens, *call[5:])
        accepted = [data.draw(st.integers(0, length)) for _ in begins]
        call = call._replace(state=commit(backend, part, verify(backend, part), accepted))
        begins = [begin + count for begin, count in zip(begins, accepted)]
    whole = random(*pair, DeltaShape("", B=2, T=sum(lengths)), P=2, seed=seed)
    for n, begin in enumerate(begins):
        alone = with_rows(
            whole._replace(**{name: getattr(whole, name)[n : n + 1, :begin] for name in whole._fields[:5]}), [n]
        )
        _, pool = draft_properties.run(backend, alone)
        assert_error("pool", call.state[n], pool[n], 1e-6 if pair[0] == F32 else 1e-12)


@each_backend
@pytest.mark.parametrize("g", (-104.0, -1000.0, -math.inf), ids=str)
def test_decay_that_forgets_everything(backend, g):
    call = random()
    call.g[:, 1] = g
    draft_properties.check(backend, call, [5, 2, 1])


@each_backend
def test_many_tokens(backend):
    """More than any backend prepares at a time."""
    call = random(F32, BF16, DRAFT._replace(T=40))
    for accepted in ([40, 17, 16], [1, 33, 32]):
        draft_properties.accepted_prefix_equals_one_call(backend, call, accepted)


# ---- the pool and the buffers


@each_backend
@each_pair
def test_any_bits_are_kept_without_an_accepted_token(backend, dtype, state_dtype):
    draft_properties.any_bits_are_kept_without_an_accepted_token(backend, random(dtype, state_dtype))


@each_backend
@each_pair
def test_rejected_tokens_do_not_matter(backend, dtype, state_dtype):
    draft_properties.rejected_tokens_do_not_matter(backend, with_rows(random(dtype, state_dtype), (4, 0, 2)), (2, 0, 5))


@each_backend
@each_pair
def test_rows_do_not_depend_on_others(backend, dtype, state_dtype):
    draft_properties.rows_do_not_depend_on_others(backend, with_rows(random(dtype, state_dtype), (4, 0, 2)), (2, 0, 5))


@each_backend
@each_pair
@pytest.mark.parametrize("rows", (None, (4, -1, 2)), ids=str)
def test_every_element_is_written_and_repeats_bitwise(backend, dtype, state_dtype, rows):
    draft_properties.repeated_runs_are_equal(backend, with_rows(random(dtype, state_dtype), rows), (2, 0, 5))


@each_backend
@each_pair
def test_arguments_stay_as_they_are(backend, dtype, state_dtype):
    draft_properties.arguments_stay_as_they_are(backend, with_rows(random(dtype, state_dtype), (4, -1, 2)), (2, 0, 5))


@each_backend
@pytest.mark.parametrize("shape", (DeltaShape("no tokens", B=2, T=0), DeltaShape("no sequences", B=0, T=3)), ids=ids)
@pytest.mark.parametrize("indexed", (False, True), ids=("rows in order", "indices"))
def test_nothing_to_do(backend, shape, indexed):
    call = random(shape=shape)
    call = with_rows(call, range(shape.B)) if indexed else call
    draft = verify(backend, call)
    assert [t.shape for t in draft] == [call.v.shape, call.k.shape, call.v.shape]
    assert_bitwise(commit(backend, call, draft, [0] * shape.B), call.state, "pool")


def test_plain_commit_clamps_what_nobody_checked():
    """On CUDA the numbers are not read on the host."""
    call = random()
    draft = verify(PLAIN, call)
    assert_bitwise(commit(PLAIN, call, draft, [-3, 9, 2**40]), commit(PLAIN, call, draft, [0, 5, 5]), "pool")


def test_python_functions():
    call = random()
    keys, updates = torch.empty(3, 5, 2, 13), torch.empty(3, 5, 4, 70)
    rows = torch.tensor([4, 0, 2])
    call = call._replace(state_indices=rows, scale=13**-0.5)
    draft, pool = verify(OPS, call), call.state.clone()
    o = jetkernels.recurrent_gated_delta_rule_verify(*call[:5], pool, keys, updates, rows, use_qk_l2norm_in_kernel=True)
    for name, out, expected in zip(Draft._fields, (o, keys, updates), draft):
        assert_bitwise(out, expected, name)
    accepted = torch.tensor([1, 5, 0], dtype=torch.int32)
    assert jetkernels.recurrent_gated_delta_rule_commit_(keys, updates, call.g, accepted, pool, rows) is None
    assert_bitwise(pool, commit(OPS, call, draft, [1, 5, 0]), "pool")
