"""The Hopper kernel of the backward of delta_gates: its gradients on the simulator and on a GPU, its bytes, its machine
code.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arguments import cotangents, gates_inputs
from support.backends import reference_gradients
from support.comparison import TOLERANCE, assert_bitwise, assert_error
from support.device_backends import EARLY, assert_every_schedule_agrees, each_device, hoppersim, simulated
from support.kernel_code import disassembly, report
from support.layouts import laid_out, with_layouts
from support.memory import poisoned_allocations
from support.shapes import ids
from support.strategies import layouts, seeds

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (BF16, F16, F32)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)
SIZES = ((12,), (1, 1), (90, 12), (3, 1024), (2, 3, 7), (5, 600), (700, 1), (9, 256), (0, 12), (3, 0))


def check_gradients(backend, inputs, grads, laid=None) -> None:
    """``laid``: the inputs in another layout."""
    refs = reference_gradients("delta_gates", inputs, grads)
    for name, grad in backend.gradients("delta_gates", inputs if laid is None else laid, grads).items():
        like = getattr(inputs, name)
        assert (grad.shape, grad.dtype) == (like.shape, like.dtype) and grad.is_contiguous(), name
        assert_error(f"d{name}", grad, refs[name], TOLERANCE[grad.dtype].gradient)


@each_device
@each_dtype
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_delta_gates_backward_equals_fp64_differentiation(backend, dtype, sizes):
    inputs = gates_inputs(*sizes, dtype=dtype)
    dg, dbeta = cotangents(inputs)
    with poisoned_allocations():
        check_gradients(backend, inputs, (dg, dbeta))
        check_gradients(backend, inputs, (dg, None))


@each_device
@settings(max_examples=8)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    narrow=st.booleans(),
    layouts=layouts,
    grad_layouts=layouts,
    seed=seeds,
)
def test_delta_gates_backward_of_any_shape_and_layout(backend, sizes, dtype, narrow, layouts, grad_layouts, seed):
    inputs = gates_inputs(*sizes, dtype=dtype, seed=seed)
    if narrow:
        inputs = inputs._replace(A_log=inputs.A_log.to(dtype), dt_bias=inputs.dt_bias.to(dtype))
    grads = [laid_out(grad, layout) for grad, layout in zip(cotangents(inputs), [*grad_layouts, "contiguous"] * 2)]
    check_gradients(backend, inputs, grads, with_layouts(inputs, layouts))


@each_device
def test_slices_of_one_projection_give_the_same_delta_gates_backward(backend):
    projected = torch.randn(50, 100).to(BF16)
    inputs = gates_inputs(50, 12, dtype=BF16)._replace(a=projected[:, 7:19], b=projected[:, 80:92])
    own = inputs._replace(a=inputs.a.contiguous(), b=inputs.b.contiguous())
    grads = cotangents(inputs)
    for (name, found), same in zip(
        backend.gradients("delta_gates", inputs, grads).items(), backend.gradients("delta_gates", own, grads).values()
    ):
        assert_bitwise(found, same, name)


@each_device
def test_nan_stays_in_its_element_of_delta_gates_backward(backend):
    """And, of a, in the sums of its head."""
    inputs = gates_inputs(40, 12)
    bad = inputs._replace(a=inputs.a.clone(), b=inputs.b.clone())
    bad.a[17, 3], bad.b[29, 5] = math.nan, math.nan
    grads = cotangents(inputs)
    clean, dirty = (backend.gradients("delta_gates", each, grads) for each in (inputs, bad))
    for name, place in (("a", (17, 3)), ("b", (29, 5)), ("A_log", 3), ("dt_bias", 3)):
        assert dirty[name][place].isnan() and clean[name].isfinite().all(), name
        clean[name][place], dirty[name][place] = 0, 0
        assert_bitwise(dirty[name], clean[name], name)


@each_device
def test_delta_gates_backward_is_accurate_where_beta_is_nearly_1(backend):
    inputs = gates_inputs(4, 16)._replace(b=torch.linspace(-60, 60, 64).view(4, 16))
    ones = torch.ones_like(inputs.b)
    db, b = backend.gradients("delta_gates", inputs, (ones, ones))["b"], inputs.b.double()
    exact = torch.exp(-b.abs()) / (1 + torch.exp(-b.abs())) ** 2
    assert ((db - exact).abs() <= 1e-6 * exact).all()


@each_device
@each_dtype
def test_delta_gates_backward_at_extremes(backend, dtype):
    """What the CPU's code gives, NaN included."""
    most = torch.finfo(dtype).max
    x = torch.tensor((0.0, most, -most, math.inf, -math.inf, math.nan, 88.0, -88.0, 100.0, -100.0), dtype=dtype)[None]
    for rate in (0.0, -math.inf):
        inputs = gates_inputs(1, 10, dtype=dtype)._replace(a=x, b=x, A_log=torch.full((10,), rate))
        ones = torch.ones(1, 10)
        expected = torch.ops.jet.delta_gates_backward(ones, ones, *inputs)
        for out, ref in zip(backend.gradients("delta_gates", inputs, (ones, ones)).values(), expected):
            finfo = torch.finfo(out.dtype)
            close = torch.allclose(out, ref, rtol=max(finfo.eps, 1e-6), atol=finfo.tiny, equal_nan=True)
            assert close, (out, ref)


@each_device
def test_sums_of_delta_gates_backward_over_many_tokens_are_exact_to_fp32(backend):
    """Also of terms of both signs that nearly cancel; twice the same bits."""
    inputs = gates_inputs(20000, 3, dtype=BF16)
    grads = cotangents(inputs)
    found, again = (backend.gradients("delta_gates", inputs, grads) for _ in range(2))
    refs = reference_gradients("delta_gates", inputs, grads)
    for name, grad in found.items():
        assert_bitwise(grad, again[name], name)
    for name in ("A_log", "dt_bias"):
        assert_error(name, found[name], refs[name], 2e-6)


@simulated
def test_every_schedule_agrees():
    inputs = gates_inputs(300, 12, dtype=BF16)
    grads = cotangents(inputs)
    assert_every_schedule_agrees(lambda backend: tuple(backend.gradients("delta_gates", inputs, grads).values()))


@simulated
@pytest.mark.parametrize("tokens, ctas", ((80, 1), (4000, 50)))
def test_delta_gates_backward_moves_little_beside_its_inputs_and_outputs(tokens, ctas):
    """A CTA has 20 tokens of 12 heads at a time, 4 times: whole sectors. It writes 24 sums; a thread reads A_log and
    dt_bias of its head.
    """
    H = 12
    inputs = gates_inputs(tokens, H, dtype=BF16)
    with hoppersim.simulate():
        EARLY.functions.delta_gates_backward(*cotangents(inputs), *inputs)
        counters, sums = (launch["counters"] for launch in hoppersim.launches())
    partials = ctas * 2 * H * 4
    assert counters["global_write_bytes"] == 2 * tokens * H * 2 + partials
    assert counters["global_read_bytes"] == tokens * H * (2 * 2 + 2 * 4) + ctas * 240 * 2 * 4
    assert (sums["global_read_bytes"], sums["global_write_bytes"]) == (partials, 2 * H * 4)
    sectors = sum(counters[f"global_{way}_sectors"] for way in ("read", "write"))
    assert sectors * 32 <= 1.1 * tokens * H * 16
    assert counters["shared_wavefronts"] == counters["shared_ideal_wavefronts"]


def test_delta_gates_backward_does_not_spill():
    for stem in ("csrc.pointwise.delta_gates_backward", "csrc.hopper.partial_sums"):
        for name, facts in report(stem).items():
            assert facts.spill_bytes == 0 and facts.stack_bytes == 0 and facts.registers <= 64, name
        for name, code in disassembly(stem).items():
            assert not code.uses("LDL", "STL"), name
