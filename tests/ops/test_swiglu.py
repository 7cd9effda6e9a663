"""jet::swiglu: silu(gate) * up with one rounding, of tensors of any strides."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.arguments import SwigluInputs, cotangents, swiglu_inputs
from support.backends import OPS, each_backend, each_dtype
from support.comparison import DTYPES, TOLERANCE, assert_bitwise, assert_error, rms
from support.layouts import laid_out, with_layouts
from support.memory import poisoned_allocations
from support.strategies import layouts, seeds

import jetkernels
from reference.swiglu import swiglu as definition

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SHAPES = ((1,), (15,), (16,), (17,), (1, 1), (3, 1025), (2, 3, 33), (1, 1, 8960), (700, 40), (2, 1, 2, 1, 2, 1, 2, 5))


def check_gradients(backend, inputs: SwigluInputs) -> None:
    (grad_y,) = cotangents(inputs)
    leaves = [t.double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(definition(*leaves), leaves, grad_y.double())
    found = backend("swiglu_backward", grad_y, *inputs)
    # dgate near the zero of silu' is held against a tenth of what silu' is a factor of
    floors = (0.1 * rms(grad_y.double() * inputs.up.double()), 0.0)
    for name, out, ref, like, floor in zip(("dgate", "dup"), found, expected, inputs, floors):
        assert out.dtype == like.dtype and out.is_contiguous()
        assert_error(name, out, ref, TOLERANCE[out.dtype].gradient, floor)


@each_backend
@each_dtype
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_equals_the_definition(backend, dtype, sizes):
    inputs = swiglu_inputs(*sizes, dtype=dtype)
    with poisoned_allocations():
        y = backend("swiglu", *inputs)
    assert y.dtype == dtype and y.is_contiguous()
    assert_error("y", y, definition(*inputs), TOLERANCE[dtype].output)
    check_gradients(backend, inputs)


@each_backend
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    layouts=layouts,
    seed=seeds,
)
def test_any_shape_and_layout(backend, sizes, dtype, layouts, seed):
    inputs = swiglu_inputs(*sizes, dtype=dtype, seed=seed)
    y = backend("swiglu", *with_layouts(inputs, layouts))
    assert y.is_contiguous()
    assert_error("y", y, definition(*inputs), TOLERANCE[dtype].output)
    check_gradients(backend, with_layouts(inputs, layouts))


@each_backend
@pytest.mark.parametrize("sizes", ((5, 1), (1, 5), (1, 1, 3)), ids=str)
def test_strides_of_dimensions_of_size_1_mean_nothing(backend, sizes):
    inputs = swiglu_inputs(*sizes)
    other = with_layouts(inputs, ("strides of ones",) * 2)
    assert_bitwise(backend("swiglu", *other), backend("swiglu", *inputs), "y")
    check_gradients(backend, other)


@each_backend
def test_halves_of_one_projection_give_the_bits_of_tensors_of_their_own(backend):
    both = torch.randn(5, 2 * 1100, dtype=BF16)
    gate, up = both.chunk(2, -1)
    assert_bitwise(backend("swiglu", gate, up), backend("swiglu", gate.contiguous(), up.contiguous()), "y")


def test_a_row_does_not_depend_on_the_others_to_the_bit():
    inputs = swiglu_inputs(9, 1037, dtype=BF16)
    y = OPS("swiglu", *inputs)
    for row in (0, 4, 8):
        assert_bitwise(OPS("swiglu", *(t[row] for t in inputs)), y[row], "row")


@each_backend
@each_dtype
def test_one_rounding(backend, dtype):
    """The result is the nearest number to the exact one, or its neighbour where they are equally near in fp32."""
    inputs = swiglu_inputs(4096, dtype=dtype)
    y, exact = backend("swiglu", *inputs).double(), definition(*inputs)
    ulp = torch.finfo(dtype).eps * 2.0 ** exact.abs().log2().floor().clamp(min=math.log2(torch.finfo(dtype).tiny))
    assert ((y - exact).abs() <= (0.501 if dtype in (BF16, torch.float16) else 4) * ulp).all()


@each_backend
@each_dtype
def test_extremes(backend, dtype):
    """An overflow of e^-gate is silu = -0; what is no number stays in its element."""
    most = torch.finfo(dtype).max
    gate = torch.tensor((0.0, -0.0, most, -most, math.inf, -math.inf, math.nan, 20.0, -20.0, -100.0), dtype=dtype)
    up = torch.ones_like(gate)
    y, expected = backend("swiglu", gate, up), definition(gate, up).to(dtype)
    assert torch.allclose(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-36, equal_nan=True), (y, expected)
    assert torch.equal(backend("swiglu", up, gate).isfinite(), gate.isfinite())


@each_backend
def test_a_broadcast_gradient(backend):
    """As the gradient of a sum has it: all strides are 0."""
    inputs = swiglu_inputs(3, 4, 37)
    grad_y = torch.tensor(0.5).expand(3, 4, 37)
    for out, ref in zip(
        backend("swiglu_backward", grad_y, *inputs), backend("swiglu_backward", grad_y.contiguous(), *inputs)
    ):
        assert_bitwise(out, ref)


def test_gradcheck_and_opcheck():
    inputs = tuple(t.requires_grad_() for t in swiglu_inputs(2, 3, 5, dtype=F64))
    assert torch.autograd.gradcheck(jetkernels.swiglu, inputs)
    torch.library.opcheck(torch.ops.jet.swiglu, inputs)
    plain = swiglu_inputs(2, 3, 5, dtype=F64)
    torch.library.opcheck(torch.ops.jet.swiglu_backward, (*cotangents(plain), *plain))


@pytest.mark.parametrize("dynamic", (False, True), ids=("static shapes", "dynamic shapes"))
def test_compiles_without_graph_breaks(dynamic):
    results = []
    for function in (
        jetkernels.swiglu,
        torch.compile(lambda g, u: jetkernels.swiglu(g, u), fullgraph=True, dynamic=dynamic, backend="aot_eager"),
    ):
        leaves = [t.requires_grad_() for t in swiglu_inputs(3, 20)]
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y.sum(), leaves)))
    for eager, compiled in zip(*results):
        assert_bitwise(compiled, eager)


def test_autocast_leaves_it_alone():
    inputs = swiglu_inputs(3, 20)
    with torch.autocast("cpu", BF16):
        y = jetkernels.swiglu(*inputs)
    assert_bitwise(y, jetkernels.swiglu(*inputs))


def test_meta():
    y = jetkernels.swiglu(torch.empty(3, 8, device="meta").mT, torch.empty(8, 3, device="meta"))
    assert y.is_meta and y.shape == (8, 3) and y.is_contiguous()


@pytest.mark.parametrize(
    "change, message",
    (
        ({"gate": torch.zeros(())}, "swiglu: gate must have 1 to 8 dimensions, got 0 with shape []"),
        ({"gate": torch.zeros([1] * 9)}, "swiglu: gate must have 1 to 8 dimensions, got 9"),
        ({"gate": torch.zeros(3, 4, dtype=torch.int32)}, "swiglu: gate must be float32 or bfloat16 or float16"),
        ({"up": torch.zeros(4)}, "swiglu: up must have the shape [3,4] of gate, got [4]"),
        ({"up": torch.zeros(1, 4)}, "swiglu: up must have the shape [3,4] of gate, got [1,4]"),
        ({"up": torch.zeros(3, 4, dtype=BF16)}, "swiglu: up must be float32 like gate, got bfloat16"),
        ({"up": torch.zeros(3, 4, device="meta")}, "swiglu: up must be on "),
    ),
    ids=str,
)
def test_wrong_arguments_are_refused(change, message):
    inputs = swiglu_inputs(3, 4)._replace(**change)
    with pytest.raises(RuntimeError) as error:
        jetkernels.swiglu(*inputs)
    assert str(error.value).startswith(message)
    if "must be on" not in message:
        with pytest.raises(RuntimeError) as fake:
            jetkernels.swiglu(*(t.to("meta") for t in inputs))
        assert str(fake.value) == str(error.value)
    with pytest.raises(TypeError, match="swiglu: up must be a Tensor, got"):
        jetkernels.swiglu(inputs.gate, 3)


def test_no_elements():
    for sizes in ((0,), (3, 0), (0, 4)):
        inputs = [laid_out(t, "padded").requires_grad_() for t in swiglu_inputs(*sizes)]
        y = jetkernels.swiglu(*inputs)
        assert y.shape == sizes
        y.sum().backward()
