"""The Hopper kernels of the backward of the norms: their gradients on the simulator and on a GPU, their cost, their
machine code.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arguments import NORM_OPS, cotangents, norm_inputs
from support.backends import OPS, reference_gradients
from support.comparison import assert_bitwise, rms_error
from support.device_backends import EARLY, assert_every_schedule_agrees, each_device, hoppersim, simulated
from support.kernel_code import disassembly, report
from support.layouts import laid_out, with_layouts
from support.memory import poisoned_allocations
from support.norm_properties import check_norm_gradients
from support.shapes import ids
from support.strategies import layouts, seeds
from torch import Tensor

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, F16, F32)
each_op = pytest.mark.parametrize("op", NORM_OPS, ids=lambda op: f"{op}_backward")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)
MULTIPROCESSORS = 132

SHAPES = (
    (3, 2048),
    (2, 3, 12, 256),
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
    (150, 4096),  # more rows than CTAs of a team each
    (1100, 64),
)


@each_device
@each_op
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_fp64_differentiation(backend, op, dtype, shape):
    for weight_dtype in {dtype, F32}:
        inputs = norm_inputs(op, *shape, dtype=dtype, weight_dtype=weight_dtype)
        with poisoned_allocations():
            check_norm_gradients(backend, op, inputs, cotangents(inputs))


@each_device
@each_op
@settings(max_examples=8)
@given(
    leading=st.lists(st.integers(1, 5), max_size=3),
    C=st.one_of(st.integers(1, 300), st.integers(1, 40).map(lambda n: 8 * n)),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    layouts=layouts,
    grad_layouts=layouts,
    seed=seeds,
)
def test_any_shape_and_layout(backend, op, leading, C, dtype, wide, layouts, grad_layouts, seed):
    inputs = norm_inputs(op, *leading, C, dtype=dtype, weight_dtype=F32 if wide else None, seed=seed)
    grads = [laid_out(grad, layout) for grad, layout in zip(cotangents(inputs), [*grad_layouts, "contiguous"] * 2)]
    check_norm_gradients(backend, op, with_layouts(inputs, layouts), grads)


@each_device
@pytest.mark.parametrize("C", (264, 33))
def test_gradient_of_y_alone(backend, C):
    inputs = norm_inputs("add_rms_norm", 5, C, dtype=BF16)
    grad_y, grad_sum = cotangents(inputs)
    check_norm_gradients(backend, "add_rms_norm", inputs, (grad_y, None))
    check_norm_gradients(backend, "add_rms_norm", inputs, (torch.zeros_like(grad_y), grad_sum))


@each_device
@each_op
def test_heads_of_a_fused_projection_are_read_where_they_are(backend, op):
    inputs = norm_inputs(op, 2, 3, 4, 16, dtype=BF16)
    name = {"rms_norm": "x", "add_rms_norm": "residual", "gated_rms_norm": "gate"}[op]
    fused = torch.full((2, 5, 200), torch.nan, dtype=BF16)
    view = fused[:, 2:, 8:][..., :64].unflatten(-1, (4, 16)).copy_(getattr(inputs, name))
    grads = cotangents(inputs)
    found, same = (backend.gradients(op, each, grads) for each in (inputs._replace(**{name: view}), inputs))
    for argument, grad in found.items():
        assert_bitwise(grad, same[argument], argument)


@each_device
@each_op
@pytest.mark.parametrize("C", (264, 40, 33))
def test_a_row_gives_the_same_bits_in_every_batch(backend, op, C):
    inputs = norm_inputs(op, 150, C, dtype=BF16)
    grads = cotangents(inputs)
    together = backend.gradients(op, inputs, grads)
    for row in (0, 77, 149):
        parts = {n: t[row : row + 1] for n, t in inputs._asdict().items() if isinstance(t, Tensor) and n != "weight"}
        alone = backend.gradients(op, inputs._replace(**parts), [grad[row : row + 1] for grad in grads])
        for name in parts:
            assert_bitwise(alone[name], together[name][row : row + 1], f"d{name} of row {row}")


@each_device
@each_op
@pytest.mark.parametrize("C", (264, 40, 33))
def test_nan_stays_in_its_row(backend, op, C):
    """And makes all of dweight NaN, to which that row belongs."""
    inputs = norm_inputs(op, 3, C, dtype=BF16)
    grads = cotangents(inputs)
    x = inputs.x.clone()
    x[1, -1] = torch.nan
    clean, spoiled = (backend.gradients(op, each, grads) for each in (inputs, inputs._replace(x=x)))
    assert spoiled.pop("weight").isnan().all() and clean.pop("weight").isfinite().all()
    for name, grad in spoiled.items():
        assert grad[1].isnan().all(), name
        assert_bitwise(grad[[0, 2]], clean[name][[0, 2]], name)


@each_device
@each_op
@pytest.mark.parametrize("shape", ((0, 8), (3, 0), (2, 0, 16)), ids=str)
def test_nothing_to_do(backend, op, shape):
    inputs = norm_inputs(op, *shape, dtype=BF16)
    with poisoned_allocations():
        found = backend.gradients(op, inputs, cotangents(inputs))
    assert all(grad.shape == getattr(inputs, name).shape and not grad.any() for name, grad in found.items())


@each_device
@each_op
def test_sums_over_many_rows_are_exact_to_fp32(backend, op):
    """Also of terms of both signs that nearly cancel; twice the same bits."""
    inputs = norm_inputs(op, 5000, 64)
    grads = cotangents(inputs)
    found, again = (backend.gradients(op, inputs, grads) for _ in range(2))
    assert rms_error(found["weight"], reference_gradients(op, inputs, grads)["weight"]) < 1e-6
    for name, grad in found.items():
        assert_bitwise(grad, again[name], name)


@each_device
@each_op
@pytest.mark.parametrize("size", (1e-12, 1e15))
def test_rows_of_any_size(backend, op, size):
    inputs = norm_inputs(op, 2, 16, eps=0.0)
    of_size = inputs._replace(x=inputs.x * size)
    check_norm_gradients(backend, op, of_size, cotangents(of_size))


@each_device
def test_gates_of_any_size(backend):
    """As the CPU's code has it, NaN at infinities included."""
    x, weight, dy = torch.linspace(-1, 2, 8)[None], torch.ones(8), torch.ones(1, 8)
    for gate in (-torch.inf, -1e4, -100.0, -80.0, -20.0, -0.0, 0.0, 20.0, 100.0, torch.inf):
        arguments = (dy, x, torch.full_like(x, gate), weight, 1e-5)
        found, expected = (each("gated_rms_norm_backward", *arguments) for each in (backend, OPS))
        for out, ref in zip(found, expected):
            assert torch.allclose(out, ref, rtol=3e-6, atol=1e-36, equal_nan=True), (gate, out, ref)


@simulated
@each_op
@pytest.mark.parametrize("shape", ((280, 2048), (70, 40)), ids=str)
def test_every_schedule_agrees(op, shape):
    """The first shape has teams of two warps, half of them with two rows."""
    inputs = norm_inputs(op, *shape, dtype=BF16)
    grads = cotangents(inputs)
    assert_every_schedule_agrees(lambda backend: tuple(backend.gradients(op, inputs, grads).values()))


# ---- cost, counted by the simulator


def launched(op, inputs) -> list[dict]:
    with hoppersim.simulate():
        getattr(EARLY.functions, op + "_backward")(*cotangents(inputs), *inputs)
        return [launch["counters"] for launch in hoppersim.launches()]


@simulated
@each_op
@pytest.mark.parametrize(
    "shape, teams", (((1, 2048), 4), ((128, 1536), 5), ((96, 256), 32), ((2048, 2048), 4)), ids=str
)
def test_each_row_is_read_and_written_once(op, shape, teams):
    """The weight is read by every team, of a warp's teams together, and a CTA writes a row of partial sums, which are
    read once.
    """
    rows, C = shape
    inputs = norm_inputs(op, rows, C, dtype=BF16)
    counters, sums = launched(op, inputs)
    reads, writes = {"rms_norm": (2, 1), "add_rms_norm": (4, 2), "gated_rms_norm": (3, 2)}[op]
    ctas = min(MULTIPROCESSORS, -(-rows // teams))
    row, partials = 2 * C, ctas * 4 * C
    assert counters["global_write_bytes"] == writes * rows * row + partials
    assert counters["global_write_sectors"] * 32 == counters["global_write_bytes"]
    assert counters["global_read_bytes"] == reads * rows * row + ctas * teams * row
    assert counters["global_read_sectors"] * 32 == reads * rows * row + ctas * min(teams, 16) * row
    assert (sums["global_read_bytes"], sums["global_write_bytes"]) == (partials, row)
    assert sums["global_read_sectors"] * 32 == partials and sums["global_write_sectors"] * 32 == row
    assert sums["shared_wavefronts"] == sums["shared_ideal_wavefronts"]
    if rows > 1000:
        moved = sum(kernel[f"global_{way}_bytes"] for kernel in (counters, sums) for way in ("read", "write"))
        assert moved / ((reads + writes) * rows * row + 2 * row) <= 1.2
        assert counters["shared_wavefronts"] <= 2 * counters["shared_ideal_wavefronts"]


# ---- what the compiler made


def test_no_spills_and_16_byte_accesses():
    for name, facts in report("csrc.norm.backward").items():
        assert facts.spill_bytes == 0 and facts.stack_bytes == 0 and facts.registers <= 128, name
    for name, code in disassembly("csrc.norm.backward").items():
        assert not code.uses("LDL", "STL"), name
        if "Li1ELi16E" not in name:  # single elements
            assert code.uses("LDG.E.128") and code.uses("STG.E.128") and not code.uses("LDG.E.U16", "STG.E.U16"), name
    (facts,) = report("csrc.hopper.partial_sums").values()
    assert facts.spill_bytes == 0 and facts.stack_bytes == 0
