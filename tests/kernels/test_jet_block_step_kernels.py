"""The Hopper kernels of a JetBlock's step: their properties on the simulator and on a GPU, their cost, their machine
code.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import block_properties as properties
from support.arguments import BlockStepCall, block_step_call, with_rows
from support.comparison import assert_bitwise
from support.device_backends import EARLY, assert_every_schedule_agrees, each_device, hoppersim, simulated
from support.kernel_code import disassembly, report
from support.layouts import LAYOUTS, with_layouts
from support.shapes import ids
from support.strategies import seeds

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MODEL_2B = {"N": 3, "H": 12, "K": 96, "V": 256, "R": 384}
SHAPES = (
    MODEL_2B,
    {"N": 2, "H": 3, "K": 128, "V": 48, "R": 72},
    {"N": 1, "H": 1, "K": 256, "V": 16, "R": 8, "W": 3},
    {"N": 5, "H": 2, "K": 192, "V": 144, "R": 136, "W": 2},
    {"N": 63, "H": 1, "K": 64, "V": 32, "R": 64},
    {"N": 65, "H": 1, "K": 64, "V": 32, "R": 40},
    {"N": 129, "H": 1, "K": 64, "V": 16, "R": 64},
    {"N": 2, "H": 1, "K": 64, "V": 576, "R": 520},
    {"N": 2, "H": 1, "K": 64, "V": 1024, "R": 392},
)


def random(dtype=BF16, state_dtype=F32, **more) -> BlockStepCall:
    sizes = {"N": 3, "H": 2, "K": 64, "V": 32, "R": 64, **more}
    return block_step_call(dtype=dtype, state_dtype=state_dtype, **sizes)


@each_device
@pytest.mark.parametrize("dtype, state_dtype", ((BF16, F32), (F16, BF16)), ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(backend, dtype, state_dtype, shape):
    properties.check(backend, random(dtype, state_dtype, **shape))


@each_device
@settings(max_examples=8)
@given(
    N=st.integers(1, 6),
    H=st.integers(1, 4),
    K=st.sampled_from((64, 96, 128)),
    V=st.sampled_from((16, 32, 64, 80)),
    R=st.sampled_from((8, 24, 64, 72)),
    W=st.integers(2, 4),
    dtype=st.sampled_from((BF16, F16)),
    state_dtype=st.sampled_from((F32, BF16)),
    narrow=st.lists(st.sampled_from(("A_log", "dt_bias", "norm_weight", "bias")), unique=True),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=12, max_size=12),
    index_dtype=st.sampled_from((torch.int32, torch.int64)),
    data=st.data(),
    seed=seeds,
)
def test_any_call(backend, N, H, K, V, R, W, dtype, state_dtype, narrow, layouts, index_dtype, data, seed):
    call = random(dtype, state_dtype, N=N, H=H, K=K, V=V, R=R, W=W, seed=seed)
    for name in narrow:
        call = call._replace(**{name: None if name == "bias" else getattr(call, name).to(dtype)})
    if data.draw(st.booleans()):
        call = call._replace(norm_weight=call.norm_weight.to(F32))
    rows = data.draw(st.permutations(range(N + 2)))[:N]
    call = with_rows(call, [row if data.draw(st.booleans()) else -row - 1 for row in rows], index_dtype)
    properties.check(backend, with_layouts(call, layouts[: 11 + (call.bias is not None)]))


@each_device
def test_views_of_one_projection(backend):
    call = random(H=3, V=48)
    expected = properties.run(backend, call)
    for pad in (0, 2, 13):
        for out, ref in zip(properties.run(backend, properties.fused(call, pad)), expected):
            assert_bitwise(out, ref)


@each_device
@pytest.mark.parametrize("state_dtype", (F32, BF16), ids=ids)
def test_a_pool_with_v_first_gives_the_same_bits(backend, state_dtype):
    call = random(BF16, state_dtype, H=3, V=64)
    v_first = call._replace(state=call.state.mT.contiguous().mT)
    for out, ref in zip(properties.run(backend, v_first), properties.run(backend, call)):
        assert_bitwise(out, ref)


@each_device
@pytest.mark.parametrize("state_dtype", (F32, BF16), ids=ids)
def test_which_rows_are_read_and_written(backend, state_dtype):
    call = random(BF16, state_dtype)
    properties.negative_index_is_not_a_row(backend, call)
    for rows in ((3, 0, 1), (-1, 2, -1)):
        properties.other_rows_do_not_matter(backend, call, rows)
    for rows in (None, (4, -1, 2)):
        properties.every_element_is_written(backend, with_rows(call, rows))
    properties.writes_to_nothing_but_the_pools(backend, call)
    for n in range(3):
        properties.nan_stays_in_its_sequence(backend, with_rows(call, (4, 0, 2)), n, math.inf)


@each_device
@pytest.mark.parametrize("a", (-200.0, -20.0, 19.9, 20.1, 200.0), ids=str)
def test_gates_of_any_size(backend, a):
    for name in ("a", "b"):
        call = random()
        getattr(call, name)[:, 1] = a
        properties.check(backend, call)


@each_device
def test_no_sequences(backend):
    y, *pools = properties.run(backend, random(N=0, P=5))
    assert y.shape == (0, 64)
    for pool in pools:
        assert pool.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@simulated
def test_every_schedule_agrees(shape):
    call = random(**shape)
    assert_every_schedule_agrees(lambda backend: properties.run(backend, call))


# ---- cost, counted by the simulator


@simulated
def test_three_launches_move_little_but_weights_and_states():
    """What passes from one launch to the next, v' and o, is a hundredth of the states."""
    call = block_step_call(**(MODEL_2B | {"N": 33}), P=33, dtype=BF16, state_dtype=F32)
    properties.run(EARLY, call)
    launches = hoppersim.launches()
    assert len(launches) == 3
    state = call.state.numel() * 4
    _, recurrent, norm = (launch["counters"] for launch in launches)
    heads = call.gate.numel()
    inputs = 2 * (call.q.numel() + call.k.numel() + heads + call.a.numel() + call.b.numel())
    parameters = recurrent["global_read_bytes"] - state - inputs
    assert 0 < parameters <= 8 * 33 * 12, "A_log and dt_bias of each head"
    assert recurrent["global_write_bytes"] == state + 4 * heads
    assert norm["global_write_bytes"] == 2 * heads
    assert norm["global_write_sectors"] * 32 == norm["global_write_bytes"]
    assert norm["global_read_bytes"] == heads * (2 * 4 + 2 + 2), "o for the sum and for the result, gate, weight"


# ---- what the compiler made


def test_no_spills_and_no_local_memory():
    kernels = report("csrc.jet_block_step.launch")
    assert len(kernels) == 2, "two dtypes"
    for name, facts in kernels.items():
        assert facts.spill_bytes == 0 and facts.stack_bytes == 0, name
    for name, code in disassembly("csrc.jet_block_step.launch").items():
        assert not code.uses("LDL", "STL"), name
        assert code.uses("LDG.E.128") and code.uses("STG.E.128"), name
