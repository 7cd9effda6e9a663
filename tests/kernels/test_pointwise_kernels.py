"""The Hopper kernels of swiglu and delta_gates: their numbers on the simulator and on a GPU, their bytes, their machine
code.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arguments import GatesInputs, cotangents, gates_inputs, swiglu_inputs
from support.comparison import TOLERANCE, assert_bitwise, assert_error
from support.device_backends import EARLY, assert_every_schedule_agrees, each_device, hoppersim, simulated
from support.kernel_code import disassembly, report
from support.layouts import with_layouts
from support.memory import poisoned_allocations
from support.shapes import ids
from support.strategies import layouts, seeds

from reference.delta_gates import delta_gates as delta_gates_definition
from reference.swiglu import swiglu as swiglu_definition

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, F16, F32)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)
SWIGLU_SIZES = ((1,), (7,), (8,), (3, 1032), (5, 1025), (1, 1, 8960), (2, 3, 40))
GATE_SIZES = ((12,), (1, 1), (90, 12), (3, 1024), (2, 3, 7))


def check_swiglu(backend, inputs, layouts=()) -> None:
    dtype = inputs.gate.dtype
    (grad_y,) = cotangents(inputs)
    laid = with_layouts(inputs, layouts)
    y = backend("swiglu", *laid)
    assert y.dtype == dtype and y.is_contiguous()
    assert_error("y", y, swiglu_definition(*inputs), TOLERANCE[dtype].output)
    leaves = [t.double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(swiglu_definition(*leaves), leaves, grad_y.double())
    for name, out, ref in zip(("dgate", "dup"), backend("swiglu_backward", grad_y, *laid), expected):
        assert_error(name, out, ref, TOLERANCE[dtype].gradient)


def check_gates(backend, inputs, layouts=()) -> None:
    found = backend("delta_gates", *with_layouts(inputs, layouts))
    for name, out, ref in zip(("g", "beta"), found, delta_gates_definition(*inputs)):
        assert out.dtype == F32 and out.is_contiguous()
        assert_error(name, out, ref, TOLERANCE[F32].output)


@each_device
@each_dtype
@pytest.mark.parametrize("sizes", SWIGLU_SIZES, ids=str)
def test_swiglu_equals_the_definition(backend, dtype, sizes):
    with poisoned_allocations():
        check_swiglu(backend, swiglu_inputs(*sizes, dtype=dtype))


@each_device
@each_dtype
@pytest.mark.parametrize("sizes", GATE_SIZES, ids=str)
def test_delta_gates_equal_the_definition(backend, dtype, sizes):
    with poisoned_allocations():
        check_gates(backend, gates_inputs(*sizes, dtype=dtype))


@each_device
@settings(max_examples=8)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    layouts=layouts,
    seed=seeds,
)
def test_any_shape_and_layout(backend, sizes, dtype, layouts, seed):
    check_swiglu(backend, swiglu_inputs(*sizes, dtype=dtype, seed=seed), layouts)
    check_gates(backend, gates_inputs(*sizes, dtype=dtype, seed=seed), layouts)


@each_device
@each_dtype
def test_layouts_give_the_same_bits(backend, dtype):
    """16 bytes at a time or one element: halves of a projection, and the same at an odd address."""
    both = torch.randn(3, 2 * 264).to(dtype)
    shifted = torch.empty(both.numel() + 1, dtype=dtype)[1:].view(both.shape).copy_(both)
    y = backend("swiglu", *(t.contiguous() for t in both.chunk(2, -1)))
    assert_bitwise(backend("swiglu", *both.chunk(2, -1)), y, "halves")
    assert_bitwise(backend("swiglu", *shifted.chunk(2, -1)), y, "at an odd address")


@each_device
def test_more_rows_than_a_grid_is_high(backend):
    inputs = swiglu_inputs(65537, 2, dtype=F32)
    gate, up = (torch.cat((t, t[:, :1]), 1)[:, :2] for t in inputs)
    assert not gate.is_contiguous()
    y = backend("swiglu", gate, up)
    assert_error("y", y, swiglu_definition(*inputs), 1e-5)
    assert_error("the last rows", y[65534:], swiglu_definition(gate[65534:], up[65534:]), 1e-5)


@each_device
@each_dtype
def test_extremes(backend, dtype):
    most = torch.finfo(dtype).max
    x = torch.tensor((0.0, -0.0, most, -most, math.inf, -math.inf, math.nan, 88.0, -88.0, 100.0, -100.0), dtype=dtype)
    y, expected = backend("swiglu", x, torch.ones_like(x)), swiglu_definition(x, torch.ones_like(x)).to(dtype)
    eps = max(torch.finfo(dtype).eps, 2e-6)
    assert torch.allclose(y, expected, rtol=eps, atol=2e-36 if dtype != F16 else 2**-24, equal_nan=True), (y, expected)
    for rate in (0.0, -math.inf):
        inputs = GatesInputs(x[:, None], x[:, None], torch.full((1,), rate), torch.zeros(1))
        for out, ref in zip(backend("delta_gates", *inputs), delta_gates_definition(*inputs)):
            assert torch.allclose(out, ref.float(), rtol=1e-6, atol=2e-38, equal_nan=True), (out, ref)
        assert not (backend("delta_gates", *inputs)[0] > 0).any()


@each_device
def test_softplus_is_accurate_from_tiny_to_large(backend):
    x = torch.linspace(-80, 200, 701)
    g, beta = backend("delta_gates", x[:, None], x[:, None], torch.zeros(1), torch.zeros(1))
    for out, ref in zip((g, beta), delta_gates_definition(x[:, None], x[:, None], torch.zeros(1), torch.zeros(1))):
        assert ((out - ref) / ref).abs().max() < 1e-6


@simulated
def test_every_schedule_agrees():
    assert_every_schedule_agrees(lambda backend: (backend("swiglu", *swiglu_inputs(3, 1032, dtype=BF16)),))
    assert_every_schedule_agrees(lambda backend: backend("delta_gates", *gates_inputs(100, 12, dtype=BF16)))


# ---- what it costs


def launch_of(op: str, *args) -> dict:
    with hoppersim.simulate():
        getattr(EARLY.functions, op)(*args)
        (launch,) = hoppersim.launches()
    return launch


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@simulated
@pytest.mark.parametrize("rows", (1, 5))
def test_swiglu_moves_its_inputs_and_outputs_once(rows):
    """Halves of one projection of the 2B model's width: whole sectors, 16 bytes an access."""
    gate, up = torch.randn(rows, 2 * 8960).to(BF16).chunk(2, -1)
    counters = launch_of("swiglu", gate, up)["counters"]
    assert counters["global_read_bytes"] == nbytes(gate, up) and counters["global_write_bytes"] == nbytes(gate)
    counters = launch_of("swiglu_backward", gate, gate, up)["counters"]
    assert counters["global_read_bytes"] == nbytes(gate, gate, up)
    assert counters["global_write_bytes"] == nbytes(gate, up)


@simulated
def test_delta_gates_move_little_beside_their_inputs_and_outputs():
    inputs = gates_inputs(512, 12, dtype=BF16)
    counters = launch_of("delta_gates", *inputs)["counters"]
    assert counters["global_read_bytes"] + counters["global_write_bytes"] <= 1.05 * (nbytes(*inputs) + 2 * 512 * 12 * 4)
    assert counters["global_write_bytes"] == 2 * 512 * 12 * 4


def test_no_spills_and_wide_accesses():
    for name, facts in report("csrc.pointwise.launch").items():
        assert facts.spill_bytes == 0 and facts.stack_bytes == 0 and facts.registers <= 40, name
    for name, code in disassembly("csrc.pointwise.launch").items():
        assert not code.uses("LDL", "STL"), name
        if "swiglu" in name and "Li1E" not in name:
            assert code.uses("LDG.E.128") and code.uses("STG.E.128"), name
