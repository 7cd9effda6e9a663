"""The chunked gated delta rule on a pool of states: the Hopper kernels on the simulator and on a GPU."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import prefill_properties
from support.arguments import prefill_call
from support.device_backends import (
    CHUNK_STATE_CEILING,
    EARLY,
    assert_every_schedule_agrees,
    each_device,
    hoppersim,
    simulated,
)
from support.pool_properties import run
from support.shapes import DeltaShape, ids

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OFFSETS = (0, 1, 66, 66, 130, 330)
MARKS = {65: 8, 130: 9, 130 + 64: 6, 130 + 128: -3, 330: 11}
SHAPE = DeltaShape("", T=330, Hk=1, H=2, K=64, V=80, cu_seqlens=OFFSETS)
each_pool = pytest.mark.parametrize("state_dtype", (F32, BF16), ids=ids)


def call_of(dtype=BF16, state_dtype=F32, shape=SHAPE, rows=(4, 0, 7, -1, 2), goes_on=(True, False, True, True, True)):
    return prefill_call(shape, dtype, state_dtype, rows, goes_on, MARKS if shape.N == 5 else None)


def long_call(state_dtype=F32):
    """One sequence among short ones, so long that it is cut into segments."""
    shape = DeltaShape("", T=64 * 50, H=1, K=64, V=64, cu_seqlens=(0, 64 * 48, 64 * 50))
    return prefill_call(shape, BF16, state_dtype, (1, 0), (True, False), {64 * 3: 5, 64 * 40: 4, 64 * 48: 3})


@each_device
@each_pool
@pytest.mark.parametrize("dtype", (BF16, F16), ids=ids)
@pytest.mark.parametrize("K", (64, 96, 128, 192, 256))
def test_equals_the_reference(backend, dtype, state_dtype, K):
    call = call_of(dtype, state_dtype, SHAPE._replace(K=K))
    prefill_properties.check(backend, call, CHUNK_STATE_CEILING)


@each_device
@settings(max_examples=20)
@given(data=st.data())
def test_any_call(backend, data):
    Hk = data.draw(st.integers(1, 2))
    shape = DeltaShape(
        "",
        Hk=Hk,
        H=Hk * data.draw(st.integers(1, 2)),
        K=data.draw(st.sampled_from((64, 96))),
        V=16 * data.draw(st.integers(1, 9)),
        l2norm=data.draw(st.booleans()),
    )
    dtype, state_dtype = data.draw(st.sampled_from((BF16, F16))), data.draw(st.sampled_from((F32, BF16)))
    call = data.draw(prefill_properties.calls(shape, dtype, state_dtype))
    prefill_properties.check(backend, call, CHUNK_STATE_CEILING)


@each_device
@each_pool
def test_equals_the_op_without_a_pool_to_the_bit(backend, state_dtype):
    prefill_properties.equals_the_op_without_a_pool(backend, call_of(BF16, state_dtype))


@each_device
@each_pool
def test_properties(backend, state_dtype):
    call = call_of(BF16, state_dtype)
    prefill_properties.layout_does_not_matter(backend, call)
    prefill_properties.what_nothing_names_does_not_matter(backend, call)
    prefill_properties.every_element_is_written(backend, call)


@each_device
@each_pool
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
def test_nan_stays_in_its_sequence(backend, state_dtype, value):
    for n in (1, 4):
        prefill_properties.nan_stays_in_its_sequence(backend, call_of(BF16, state_dtype), n, value)


@each_device
def test_pieces_equal_the_whole(backend):
    shape = SHAPE._replace(T=200, cu_seqlens=(0, 200))
    prefill_properties.pieces_equal_the_whole(backend, call_of(shape=shape, rows=[1], goes_on=[False]), 128)


@each_device
def test_a_pool_without_rows(backend):
    shape = SHAPE._replace(T=70, cu_seqlens=(0, 64, 70))
    call = prefill_call(shape, BF16, F32, (-1, -2))
    out, _ = run(backend, call._replace(state=call.state[:0]))
    assert out.count_nonzero() == 0


@each_device
def test_a_sequence_in_segments(backend):
    """Its first segment begins from the row that its last one writes."""
    prefill_properties.check(backend, long_call(), CHUNK_STATE_CEILING)
    prefill_properties.layout_does_not_matter(backend, long_call())


@simulated
def test_the_long_call_is_cut():
    run(EARLY, long_call())
    assert any("join" in launch["kernel"] for launch in hoppersim.launches())


@simulated
def test_every_schedule_agrees():
    for call in (call_of(), call_of(BF16, BF16, SHAPE._replace(K=192))):
        assert_every_schedule_agrees(lambda backend, call=call: run(backend, call))


@simulated
@each_pool
@pytest.mark.parametrize("order", ("K before V", "V before K"))
def test_final_states_are_written_in_whole_sectors(state_dtype, order):
    call = call_of(BF16, state_dtype, SHAPE._replace(V=128), goes_on=None)
    call = prefill_properties.v_first(call) if order == "V before K" else call
    run(EARLY, call)
    (put,) = [launch for launch in hoppersim.launches() if "replay" in launch["kernel"]]
    counters = put["counters"]
    row = call.state[0].numel()
    written = row * 4 * call.state.element_size()  # four sequences have a row, the fifth has zero outputs
    zeros = 64 * call.v.shape[2] * call.v.shape[3] * 2
    assert counters["global_write_bytes"] == written + zeros
    assert counters["global_write_sectors"] * 32 == written + zeros
