"""jet::dynamic_conv against its definition, and the properties that it must have."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import properties
from support.cases import (
    BACKENDS,
    CONV_SHAPES,
    DTYPES,
    PACKED,
    ConvInputs,
    ConvShape,
    assert_bitwise,
    assert_error,
    assert_outputs,
    backend_id,
    check_gradients,
    check_outputs,
    conv_inputs,
    conv_shapes,
    cotangents,
    ids,
    layouts,
    seeds,
    splits,
    with_layouts,
)

OP = "dynamic_conv"
F32, F64 = torch.float32, torch.float64
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=backend_id)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)


def random(dtype: torch.dtype = F32, seed: int = 0, **shape) -> ConvInputs:
    return conv_inputs(ConvShape("", **shape), dtype, seed)


# ---- equals the reference


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", CONV_SHAPES, ids=ids)
def test_equals_the_reference(backend, dtype, shape):
    check_outputs(backend, OP, conv_inputs(shape, dtype))


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", CONV_SHAPES, ids=ids)
def test_gradients_equal_fp64_differentiation(backend, dtype, shape):
    check_gradients(backend, OP, conv_inputs(shape, dtype))


@each_backend
@given(shape=conv_shapes(), dtype=st.sampled_from(DTYPES), layouts=layouts, seed=seeds)
def test_any_shape_dtype_and_layout(backend, shape, dtype, layouts, seed):
    inputs = conv_inputs(shape, dtype, seed)
    other = with_layouts(inputs, layouts)
    check_outputs(backend, OP, other)
    check_gradients(backend, OP, other)


@each_backend
@pytest.mark.parametrize("which", ("y", "conv_state"))
@pytest.mark.parametrize("T", (1, 2, 20))
def test_gradient_of_one_output_alone(backend, which, T):
    inputs = random(T=T)
    y, S = cotangents(inputs)
    check_gradients(backend, OP, inputs, (y, None) if which == "y" else (torch.zeros_like(y), S))


@each_backend
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=("int32", "int64"))
def test_offsets_of_either_integer_dtype(backend, dtype):
    inputs = random(B=1, T=200, cu_seqlens=PACKED)
    check_outputs(backend, OP, inputs._replace(cu_seqlens=inputs.cu_seqlens.to(dtype)))


@pytest.mark.parametrize("silu", (True, False), ids=("silu", "no activation"))
@pytest.mark.parametrize("cu_seqlens", (None, (0, 0, 2, 7, 7)), ids=("rows", "packed"))
@pytest.mark.parametrize("W", (2, 3, 4))
def test_gradcheck(W, cu_seqlens, silu):
    """torch's own finite differences, for every differentiable input, conv_state included."""
    inputs = random(F64, B=1 if cu_seqlens else 2, T=7, D=3, R=2, W=W, cu_seqlens=cu_seqlens, silu=silu)
    leaves = [t.requires_grad_() for t in inputs[:5]]
    assert torch.autograd.gradcheck(lambda *t: torch.ops.jet.dynamic_conv(*t, *inputs[5:]), leaves)


# ---- calls, rows and sequences


@each_backend
@pytest.mark.parametrize("W", (2, 3, 4))
@pytest.mark.parametrize("T", (0, 1, 2, 3, 4))
def test_a_short_call_shifts_the_state(backend, T, W):
    """A call of 2 or 3 tokens with an existing state shifts it; it is not overwritten."""
    inputs = random(T=T, W=W)
    conv_state = backend(OP, *inputs)[1]
    history = torch.cat([inputs.conv_state, inputs.x.mT], -1)
    assert_bitwise(conv_state, history[..., history.shape[-1] - (W - 1) :], "conv_state")


@each_backend
@given(data=st.data(), T=st.integers(0, 40), W=st.integers(2, 4), seed=seeds)
def test_any_split_into_calls_equals_one_call(backend, data, T, W, seed):
    inputs = random(seed=seed, T=T, W=W)
    properties.any_split_equals_one_call(backend, OP, inputs, data.draw(splits(T)))


@each_backend
@pytest.mark.parametrize("W", (2, 3, 4))
def test_equals_single_steps(backend, W):
    inputs = random(T=9, W=W)
    pool, steps = inputs.conv_state.clone(), []
    for t in range(9):
        step = backend(
            "dynamic_conv_step", inputs.x[:, t], inputs.hidden[:, t], inputs.weight, inputs.bias, pool, None, True
        )
        steps.append(step)
    assert_outputs((torch.stack(steps, 1), pool), backend(OP, *inputs), F32)


@each_backend
@given(shape=conv_shapes(packed=True), dtype=st.sampled_from((F32, F64)), seed=seeds)
def test_packed_equals_separate(backend, shape, dtype, seed):
    """No convolution context leaks from one packed sequence into the next, forward or backward."""
    properties.packed_equals_separate(backend, OP, conv_inputs(shape, dtype, seed))


@each_backend
@each_dtype
def test_rows_do_not_depend_on_others(backend, dtype):
    properties.rows_do_not_depend_on_others(backend, OP, random(dtype, B=5))


@each_backend
@pytest.mark.parametrize("cu_seqlens", (None, PACKED), ids=("rows", "packed"))
def test_repeated_runs_are_equal(backend, cu_seqlens):
    shape = {"B": 1 if cu_seqlens else 3, "T": 200, "D": 96, "R": 24}
    properties.repeated_runs_are_equal(backend, OP, random(cu_seqlens=cu_seqlens, **shape))


@each_backend
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
@pytest.mark.parametrize("n", range(3))
@pytest.mark.parametrize("cu_seqlens", (None, (0, 5, 6, 20)), ids=("rows", "packed"))
def test_nan_stays_in_its_sequence(backend, cu_seqlens, n, value):
    inputs = random(B=1 if cu_seqlens else 3, cu_seqlens=cu_seqlens, D=33)
    properties.nan_stays_in_its_sequence(backend, OP, inputs, n, value)


# ---- meaning of the arguments


@each_backend
def test_a_static_kernel_is_a_depthwise_convolution(backend):
    """With weight = 0 it is torch's conv1d with the bias as its kernel: tap W-1 meets the current token."""
    inputs = random(silu=False)
    y = backend(OP, *inputs._replace(weight=torch.zeros_like(inputs.weight)))[0]
    history = torch.cat([inputs.conv_state, inputs.x.mT], -1)
    expected = torch.nn.functional.conv1d(history, inputs.bias.view(12, 1, 4), groups=12).mT
    assert_error("y", y, expected, 1e-6)


@each_backend
def test_gradients_are_not_zero_when_the_generator_starts_at_zero(backend):
    """w1 random, w2 = 0: w2's gradient moves it. (With hidden = 0 too, both would stay zero for ever.)"""
    inputs = random()
    inputs = inputs._replace(weight=torch.zeros_like(inputs.weight))
    check_gradients(backend, OP, inputs)
    assert backend.gradients(OP, inputs, cotangents(inputs))["weight"].abs().max() > 0.1


@each_backend
def test_large_pre_activations(backend):
    """silu of values whose exp overflows."""
    inputs = random()
    inputs = inputs._replace(x=inputs.x * 1000)
    check_outputs(backend, OP, inputs)
    check_gradients(backend, OP, inputs)


@each_backend
@pytest.mark.parametrize(
    "shape",
    (
        ConvShape("no tokens", T=0),
        ConvShape("no rows", B=0),
        ConvShape("no sequences", B=1, T=0, cu_seqlens=(0,)),
        ConvShape("empty sequences only", B=1, T=0, cu_seqlens=(0, 0, 0)),
        ConvShape("no tokens, no state", T=0, state=False),
        ConvShape("empty sequences only, no state", B=1, T=0, cu_seqlens=(0, 0, 0), state=False),
    ),
    ids=ids,
)
def test_nothing_to_do(backend, shape):
    properties.nothing_to_do(backend, OP, conv_inputs(shape, F32))


# ---- memory


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", (*CONV_SHAPES[:3], *CONV_SHAPES[-6:]), ids=ids)
def test_every_element_is_written(backend, dtype, shape):
    properties.every_element_is_written(backend, OP, conv_inputs(shape, dtype))


@each_backend
def test_arguments_stay_as_they_are(backend):
    properties.arguments_stay_as_they_are(backend, OP, random())


@each_backend
@pytest.mark.parametrize("dim", (0, 1), ids=("rows", "tokens"))
def test_strides_beyond_32_bits(backend, dim):
    properties.strides_beyond_32_bits(backend, OP, random(torch.bfloat16, T=3), dim)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_generated_kernels_are_never_stored(dtype):
    """The peak of forward and backward grows by a few [T, D], far from the kernels' [T, D, W]."""
    script = f"""
        import resource, torch, jetkernels
        dtype, T, D, R, W = torch.{dtype}, 16384, 1024, 16, 4
        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        def run(T):
            x, hidden = torch.randn(1, T, D, dtype=dtype), torch.randn(1, T, R, dtype=dtype)
            weight, bias = torch.randn(D * W, R, dtype=dtype), torch.randn(D * W, dtype=dtype)
            before = peak()
            y, _ = torch.ops.jet.dynamic_conv(x, hidden, weight, bias, None, None, True)
            forward = peak()
            torch.ops.jet.dynamic_conv_backward(y, None, x, hidden, weight, bias, None, None, True)
            one = x.numel() * x.element_size()
            return (forward - before) / one, (peak() - forward) / one
        run(64)
        print(*run(T))
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    forward, backward = map(float, result.stdout.split())
    assert forward < 1.5, f"forward added {forward:.2f} times the size of x; y alone is 1"
    assert backward < 2.5, f"backward added {backward:.2f} times the size of x; dx alone is 1"
