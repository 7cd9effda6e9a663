"""The Hopper kernel of the norms: its properties on the simulator and on a GPU, its cost, its machine code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arguments import NORM_OPS, norm_inputs
from support.backends import listed
from support.comparison import assert_bitwise
from support.device_backends import assert_every_schedule_agrees, each_device, hoppersim, simulated
from support.jet_sim import jet_sim
from support.kernel_code import disassembly, report
from support.layouts import with_layouts
from support.memory import poisoned_allocations
from support.norm_properties import check_norm, nan_stays, rows_alone
from support.shapes import ids
from support.strategies import layouts, seeds

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, F16, F32)
each_op = pytest.mark.parametrize("op", NORM_OPS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)

SHAPES = (
    (1, 1536),
    (3, 2048),
    (2, 3, 12, 256),
    (5, 64),
    (1,),
    (7,),
    (8,),
    (130, 72),
    (9, 96),
    (3, 255),
    (4, 257),
    (2, 2047),
    (2, 4096),
    (1, 8191),
    (300, 576),
)


@each_device
@each_op
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(backend, op, dtype, shape):
    for weight_dtype in {dtype, F32}:
        with poisoned_allocations():
            check_norm(backend, op, norm_inputs(op, *shape, dtype=dtype, weight_dtype=weight_dtype), 5e-6)


@each_device
@each_op
@settings(max_examples=8)
@given(
    leading=st.lists(st.integers(1, 5), max_size=3),
    C=st.one_of(st.integers(1, 300), st.integers(1, 40).map(lambda n: 8 * n)),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    layouts=layouts,
    seed=seeds,
)
def test_any_shape_and_layout(backend, op, leading, C, dtype, wide, layouts, seed):
    inputs = norm_inputs(op, *leading, C, dtype=dtype, weight_dtype=F32 if wide else None, seed=seed)
    check_norm(backend, op, with_layouts(inputs, layouts), 5e-6)


@each_device
@each_op
def test_heads_of_a_fused_projection_are_read_where_they_are(backend, op):
    inputs = norm_inputs(op, 2, 3, 4, 16, dtype=BF16)
    name = {"rms_norm": "x", "add_rms_norm": "residual", "gated_rms_norm": "gate"}[op]
    fused = torch.full((2, 5, 200), torch.nan, dtype=BF16)
    view = fused[:, 2:, 8:][..., :64].unflatten(-1, (4, 16)).copy_(getattr(inputs, name))
    for out, same in zip(listed(backend(op, *inputs._replace(**{name: view}))), listed(backend(op, *inputs))):
        assert_bitwise(out, same, op)


@each_device
@each_op
@pytest.mark.parametrize("C", (264, 40, 33))
def test_a_row_gives_the_same_bits_in_every_batch(backend, op, C):
    rows_alone(backend, op, norm_inputs(op, 150, C, dtype=BF16), (0, 77, 149))


@each_device
@each_op
@pytest.mark.parametrize("C", (264, 40, 33))
def test_nan_stays_in_its_row(backend, op, C):
    nan_stays(backend, op, norm_inputs(op, 3, C, dtype=BF16))


@each_device
@each_op
@pytest.mark.parametrize("shape", ((0, 8), (3, 0), (2, 0, 16)), ids=str)
def test_nothing_to_do(backend, op, shape):
    for out in listed(backend(op, *norm_inputs(op, *shape, dtype=BF16))):
        assert out.shape == shape


@simulated
@each_op
@pytest.mark.parametrize("shape", ((1100, 512), (70, 40)), ids=str)
def test_every_schedule_agrees(op, shape):
    """The first shape has more rows than teams."""
    inputs = norm_inputs(op, *shape, dtype=BF16)
    assert_every_schedule_agrees(lambda backend: listed(backend(op, *inputs)))


# ---- cost, counted by the simulator


def launched(op, inputs):
    with hoppersim.simulate():
        getattr(jet_sim(), op)(*inputs)
        (launch,) = hoppersim.launches()
    return launch


@simulated
@each_op
@pytest.mark.parametrize(
    "shape, teams", (((1, 2048), 1), ((128, 1536), 128), ((12, 256), 12), ((8192, 2048), 528)), ids=str
)
def test_each_row_is_read_and_written_once(op, shape, teams):
    """The weight is read by every team; of many rows that is next to nothing."""
    inputs = norm_inputs(op, *shape, dtype=BF16)
    launch = launched(op, inputs)
    counters = launch["counters"]
    reads, writes = {"rms_norm": (1, 1), "add_rms_norm": (2, 2), "gated_rms_norm": (2, 1)}[op]
    row, rows = shape[1] * 2, shape[0]
    assert counters["global_write_bytes"] == writes * rows * row
    assert counters["global_write_sectors"] * 32 == counters["global_write_bytes"]
    assert counters["global_read_bytes"] == reads * rows * row + teams * row
    assert counters["global_read_sectors"] * 32 == counters["global_read_bytes"]
    least = (reads + writes) * rows * row + row
    if rows > 1000:
        assert counters["global_read_bytes"] + counters["global_write_bytes"] <= 1.05 * least


# ---- what the compiler made


def test_no_spills_and_16_byte_accesses():
    for name, facts in report("csrc.norm.launch").items():
        assert facts.spill_bytes == 0 and facts.stack_bytes == 0 and facts.registers <= 64, name
    for name, code in disassembly("csrc.norm.launch").items():
        assert not code.uses("LDL", "STL"), name
        if "Li1ELi8E" not in name:  # single elements
            assert code.uses("LDG.E.128") and code.uses("STG.E.128") and not code.uses("LDG.E.U16", "STG.E.U16"), name
