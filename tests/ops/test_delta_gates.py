"""jet::delta_gates: g = -exp(A_log) softplus(a + dt_bias), beta = sigmoid(b)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.arguments import GatesInputs, accumulator, cotangents, gates_inputs
from support.backends import OPS, each_backend, each_dtype
from support.comparison import DTYPES, TOLERANCE, assert_bitwise, assert_error
from support.layouts import with_layouts
from support.memory import poisoned_allocations
from support.strategies import layouts, seeds

import jetkernels
from reference.delta_gates import delta_gates as definition

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
SHAPES = ((12,), (1, 12), (1, 1, 16), (5, 1), (2, 3, 7), (90, 12), (3, 1024), (2, 1500), (1100, 12))
NAMES = ("da", "db", "dA_log", "ddt_bias")


def real_tolerance(dtype: torch.dtype) -> float:
    """The gates are fp32 whatever the inputs are."""
    return TOLERANCE[accumulator(dtype)].output


def check_gradients(backend, inputs: GatesInputs, **missing: None) -> None:
    grads = dict(zip(("grad_g", "grad_beta"), cotangents(inputs))) | missing
    leaves = [t.double().requires_grad_() for t in inputs]
    outs = [(out, grad.double()) for out, grad in zip(definition(*leaves), grads.values()) if grad is not None]
    expected = torch.autograd.grad(
        [out for out, _ in outs], leaves, [grad for _, grad in outs], allow_unused=True, materialize_grads=True
    )
    found = backend("delta_gates_backward", *grads.values(), *inputs)
    for name, out, ref, like in zip(NAMES, found, expected, inputs):
        assert (out.dtype, out.shape) == (like.dtype, like.shape) and out.is_contiguous(), name
        assert_error(name, out, ref, TOLERANCE[out.dtype].gradient)


@each_backend
@each_dtype
@pytest.mark.parametrize("sizes", SHAPES, ids=str)
def test_equals_the_definition(backend, dtype, sizes):
    inputs = gates_inputs(*sizes, dtype=dtype)
    with poisoned_allocations():
        found = backend("delta_gates", *inputs)
    for name, out, ref in zip(("g", "beta"), found, definition(*inputs)):
        assert out.dtype == accumulator(dtype) and out.is_contiguous()
        assert_error(name, out, ref, real_tolerance(dtype))
    check_gradients(backend, inputs)
    check_gradients(backend, inputs, grad_beta=None)


@each_backend
@given(
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    narrow=st.booleans(),
    layouts=layouts,
    seed=seeds,
)
def test_any_shape_and_layout(backend, sizes, dtype, narrow, layouts, seed):
    inputs = gates_inputs(*sizes, dtype=dtype, seed=seed)
    if narrow:
        inputs = inputs._replace(A_log=inputs.A_log.to(dtype), dt_bias=inputs.dt_bias.to(dtype))
    for out, ref in zip(backend("delta_gates", *with_layouts(inputs, layouts)), definition(*inputs)):
        assert out.is_contiguous()
        assert_error("gate", out, ref, real_tolerance(dtype))
    check_gradients(backend, with_layouts(inputs, layouts))


@each_backend
def test_slices_of_one_projection_give_the_bits_of_tensors_of_their_own(backend):
    projected = torch.randn(50, 100, dtype=BF16)
    inputs = gates_inputs(50, 12, dtype=BF16)._replace(a=projected[:, 7:19], b=projected[:, 80:92])
    own = inputs._replace(a=inputs.a.contiguous(), b=inputs.b.contiguous())
    for out, ref in zip(backend("delta_gates", *inputs), backend("delta_gates", *own)):
        assert_bitwise(out, ref)


@each_backend
@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
def test_db_is_accurate_where_beta_is_nearly_1(backend, dtype):
    inputs = gates_inputs(4, 16, dtype=dtype)._replace(b=torch.linspace(-60, 60, 64, dtype=dtype).view(4, 16))
    ones = torch.ones_like(inputs.b)
    db, b = backend("delta_gates_backward", ones, ones, *inputs)[1], inputs.b.double()
    exact = torch.exp(-b.abs()) / (1 + torch.exp(-b.abs())) ** 2
    assert ((db - exact).abs() <= 1e-6 * exact).all()


def test_a_row_does_not_depend_on_the_others_to_the_bit():
    inputs = gates_inputs(201, 12, dtype=BF16)
    gates = OPS("delta_gates", *inputs)
    for row in (0, 4, 200):
        alone = OPS("delta_gates", inputs.a[row], inputs.b[row], *inputs[2:])
        for out, ref in zip(alone, gates):
            assert_bitwise(out, ref[row], "row")


@each_backend
@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
def test_softplus_is_accurate_from_tiny_to_large(backend, dtype):
    """Element by element: of the tiny ones too, where 1 + e^x would round the digits away, and without a threshold."""
    x = torch.cat([torch.linspace(-80, 200, 2801, dtype=F64), torch.tensor((3e4, 1e30), dtype=F64)]).to(dtype)
    zero = torch.zeros(1, dtype=dtype)
    g, _ = backend("delta_gates", x[:, None], x[:, None], zero, zero)
    exact, _ = definition(x[:, None], x[:, None], zero, zero)
    assert ((g - exact) / exact).abs().max() < (4e-7 if dtype == F32 else 1e-14)


@each_backend
@each_dtype
def test_extremes(backend, dtype):
    """A rate of 0 keeps all, and a NaN stays in its element; g is never above 0."""
    most = torch.finfo(dtype).max
    a = torch.tensor((0.0, most, -most, math.inf, -math.inf, math.nan, 88.0, -88.0, 100.0, -100.0), dtype=dtype)
    for rate in (0.0, -math.inf):
        A_log = torch.full((1,), rate, dtype=accumulator(dtype))
        inputs = GatesInputs(a[:, None], a[:, None], A_log, torch.zeros_like(A_log))
        for out, ref in zip(backend("delta_gates", *inputs), definition(*inputs)):
            assert torch.allclose(out, ref.to(out.dtype), rtol=1e-6, atol=2e-38, equal_nan=True), (out, ref)
        g, _ = backend("delta_gates", *inputs)
        assert not (g > 0).any() and g.isnan().sum() == (1 if rate == 0 else 2)  # -0 * softplus(inf) is no number


@each_backend
def test_nan_stays_in_its_row(backend):
    inputs = gates_inputs(40, 12)
    bad = inputs._replace(a=inputs.a.clone(), b=inputs.b.clone())
    bad.a[17], bad.b[17] = math.nan, math.nan
    for out, dirty in zip(backend("delta_gates", *inputs), backend("delta_gates", *bad)):
        assert dirty[17].isnan().all()
        out[17], dirty[17] = 0, 0
        assert_bitwise(dirty, out)
    grads = cotangents(inputs)
    clean = backend("delta_gates_backward", *grads, *inputs)
    for out, dirty in zip(clean[:2], backend("delta_gates_backward", *grads, *bad)):
        out[17], dirty[17] = 0, 0
        assert_bitwise(dirty, out)


def test_sums_over_tokens_repeat_and_are_exact_to_fp32():
    """Also of many tokens, by any number of threads; terms of both signs that nearly cancel."""
    inputs = gates_inputs(6000, 12, dtype=BF16)
    grads = cotangents(inputs)
    leaves = [t.double().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(definition(*leaves), leaves, [grad.double() for grad in grads])
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.ops.jet.delta_gates_backward(*grads, *inputs))
    finally:
        torch.set_num_threads(threads)
    for again in found[1:]:
        for out, ref in zip(again, found[0]):
            assert_bitwise(out, ref)
    for out, ref in zip(found[0][2:], expected[2:]):
        assert_error("sum", out, ref, 1e-6)


def test_gradcheck_and_opcheck():
    inputs = tuple(t.requires_grad_() for t in gates_inputs(2, 3, 5, dtype=F64))
    assert torch.autograd.gradcheck(jetkernels.delta_gates, inputs)
    torch.library.opcheck(torch.ops.jet.delta_gates, inputs)
    plain = gates_inputs(2, 3, 5, dtype=F64)
    grads = cotangents(plain)
    torch.library.opcheck(torch.ops.jet.delta_gates_backward, (*grads, *plain))
    torch.library.opcheck(torch.ops.jet.delta_gates_backward, (grads[0], None, *plain))


def test_one_output_without_a_gradient():
    for which in (0, 1):
        leaves = [t.requires_grad_() for t in gates_inputs(3, 4)]
        jetkernels.delta_gates(*leaves)[which].sum().backward()
        used = (0, 2, 3) if which == 0 else (1,)
        assert [bool((leaf.grad != 0).any()) for leaf in leaves] == [i in used for i in range(4)]


@pytest.mark.parametrize("dynamic", (False, True), ids=("static shapes", "dynamic shapes"))
def test_compiles_without_graph_breaks(dynamic):
    results = []
    for function in (
        jetkernels.delta_gates,
        torch.compile(lambda *x: jetkernels.delta_gates(*x), fullgraph=True, dynamic=dynamic, backend="aot_eager"),
    ):
        leaves = [t.requires_grad_() for t in gates_inputs(3, 20)]
        g, beta = function(*leaves)
        results.append((g, beta, *torch.autograd.grad(g.sum() + beta.sum(), leaves)))
    for eager, compiled in zip(*results):
        assert_bitwise(compiled, eager)


@pytest.mark.parametrize(
    "change, message",
    (
        ({"a": torch.zeros(())}, "a must have 1 to 8 dimensions, got 0 with shape []"),
        ({"a": torch.zeros(3, 4, dtype=torch.int64)}, "a must be float32 or bfloat16 or float16 or float64, got int64"),
        ({"b": torch.zeros(3, 5)}, "b must have the shape [3,4] of a, got [3,5]"),
        ({"b": torch.zeros(3, 4, dtype=BF16)}, "b must be float32 like a, got bfloat16"),
        ({"A_log": torch.zeros(3)}, "A_log [H] dimension 0 must be H = 4 (as in a), got 3"),
        ({"A_log": torch.zeros(1, 4)}, "A_log must have 1 dimensions [H], got 2 with shape [1,4]"),
        ({"dt_bias": torch.zeros(4, dtype=BF16)}, "dt_bias must be float32 like a, got bfloat16"),
    ),
    ids=str,
)
def test_wrong_arguments_are_refused(change, message):
    inputs = gates_inputs(3, 4)._replace(**change)
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError) as error:
            jetkernels.delta_gates(*(t.to(device) for t in inputs))
        assert str(error.value) == f"delta_gates: {message}"


def test_parameters_keep_fp32_beside_narrow_inputs():
    inputs = gates_inputs(3, 4, dtype=BF16)
    assert inputs.A_log.dtype == F32
    leaves = [t.requires_grad_() for t in inputs]
    sum(gate.sum() for gate in jetkernels.delta_gates(*leaves)).backward()
    assert [leaf.grad.dtype for leaf in leaves] == [BF16, BF16, F32, F32]


def test_no_elements():
    for sizes in ((0,), (3, 0), (0, 4)):
        inputs = [t.requires_grad_() for t in gates_inputs(*sizes)]
        g, beta = jetkernels.delta_gates(*inputs)
        assert g.shape == beta.shape == sizes
        (g.sum() + beta.sum()).backward()
        assert all((t.grad == 0).all() for t in inputs)
