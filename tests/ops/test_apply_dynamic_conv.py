"""jet::apply_dynamic_conv against its definition, and the properties that it must have."""

import math

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
    ApplyInputs,
    ConvShape,
    apply_inputs,
    assert_bitwise,
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

from reference.dynamic_conv import generate_kernels

OP = "apply_dynamic_conv"
F32, F64 = torch.float32, torch.float64
SHAPES = tuple(shape for shape in CONV_SHAPES if shape.bias)
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=backend_id)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=ids)


def random(dtype: torch.dtype = F32, seed: int = 0, **shape) -> ApplyInputs:
    return apply_inputs(ConvShape("", **shape), dtype, seed)


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_equals_the_reference(backend, dtype, shape):
    check_outputs(backend, OP, apply_inputs(shape, dtype))


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_gradients_equal_fp64_differentiation(backend, dtype, shape):
    check_gradients(backend, OP, apply_inputs(shape, dtype))


@each_backend
@given(shape=conv_shapes(), dtype=st.sampled_from(DTYPES), layouts=layouts, seed=seeds)
def test_any_shape_dtype_and_layout(backend, shape, dtype, layouts, seed):
    other = with_layouts(apply_inputs(shape, dtype, seed), layouts)
    check_outputs(backend, OP, other)
    check_gradients(backend, OP, other)


@each_backend
@pytest.mark.parametrize("which", ("y", "conv_state"))
def test_gradient_of_one_output_alone(backend, which):
    inputs = random()
    y, S = cotangents(inputs)
    check_gradients(backend, OP, inputs, (y, None) if which == "y" else (torch.zeros_like(y), S))


@pytest.mark.parametrize("silu", (True, False), ids=("silu", "no activation"))
@pytest.mark.parametrize("cu_seqlens", (None, (0, 0, 2, 7, 7)), ids=("rows", "packed"))
@pytest.mark.parametrize("W", (2, 3, 4))
def test_gradcheck(W, cu_seqlens, silu):
    """torch's own finite differences, for every differentiable input, conv_state included."""
    inputs = random(F64, B=1 if cu_seqlens else 2, T=7, D=3, W=W, cu_seqlens=cu_seqlens, silu=silu)
    leaves = [t.requires_grad_() for t in inputs[:3]]
    assert torch.autograd.gradcheck(lambda *t: torch.ops.jet.apply_dynamic_conv(*t, *inputs[3:]), leaves)


@each_backend
@pytest.mark.parametrize("dtype", (F32, F64), ids=ids)
@pytest.mark.parametrize("shape", CONV_SHAPES, ids=ids)
def test_equals_dynamic_conv_with_the_kernels_it_would_generate(backend, dtype, shape):
    inputs = conv_inputs(shape, dtype)
    kernels = generate_kernels(inputs.hidden, inputs.weight, inputs.bias, shape.D)
    explicit = backend(OP, inputs.x, kernels, inputs.conv_state, inputs.cu_seqlens, inputs.silu)
    assert_outputs(explicit, backend("dynamic_conv", *inputs), dtype)


@each_backend
@pytest.mark.parametrize("W", (2, 3, 4))
@pytest.mark.parametrize("T", (0, 1, 2, 3, 4))
def test_a_short_call_shifts_the_state(backend, T, W):
    """A call of 2 or 3 tokens with an existing state shifts it; it is not overwritten."""
    inputs = random(T=T, W=W)
    history = torch.cat([inputs.conv_state, inputs.x.mT], -1)
    assert_bitwise(backend(OP, *inputs)[1], history[..., history.shape[-1] - (W - 1) :], "conv_state")


@each_backend
@given(data=st.data(), T=st.integers(0, 40), W=st.integers(2, 4), seed=seeds)
def test_any_split_into_calls_equals_one_call(backend, data, T, W, seed):
    properties.any_split_equals_one_call(backend, OP, random(seed=seed, T=T, W=W), data.draw(splits(T)))


@each_backend
@given(shape=conv_shapes(packed=True), dtype=st.sampled_from((F32, F64)), seed=seeds)
def test_packed_equals_separate(backend, shape, dtype, seed):
    """No convolution context leaks from one packed sequence into the next, forward or backward."""
    properties.packed_equals_separate(backend, OP, apply_inputs(shape, dtype, seed))


@each_backend
@each_dtype
def test_rows_do_not_depend_on_others(backend, dtype):
    properties.rows_do_not_depend_on_others(backend, OP, random(dtype, B=5))


@each_backend
@pytest.mark.parametrize("cu_seqlens", (None, PACKED), ids=("rows", "packed"))
def test_repeated_runs_are_equal(backend, cu_seqlens):
    properties.repeated_runs_are_equal(
        backend, OP, random(B=1 if cu_seqlens else 3, T=200, D=96, cu_seqlens=cu_seqlens)
    )


@each_backend
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
@pytest.mark.parametrize("n", range(3))
@pytest.mark.parametrize("cu_seqlens", (None, (0, 5, 6, 20)), ids=("rows", "packed"))
def test_nan_stays_in_its_sequence(backend, cu_seqlens, n, value):
    inputs = random(B=1 if cu_seqlens else 3, cu_seqlens=cu_seqlens, D=33)
    properties.nan_stays_in_its_sequence(backend, OP, inputs, n, value)


@each_backend
@pytest.mark.parametrize(
    "shape",
    (
        ConvShape("no tokens", T=0),
        ConvShape("no rows", B=0),
        ConvShape("no sequences", B=1, T=0, cu_seqlens=(0,)),
        ConvShape("empty sequences only", B=1, T=0, cu_seqlens=(0, 0, 0)),
        ConvShape("no tokens, no state", T=0, state=False),
    ),
    ids=ids,
)
def test_nothing_to_do(backend, shape):
    properties.nothing_to_do(backend, OP, apply_inputs(shape, F32))


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", (*SHAPES[:3], *SHAPES[-5:]), ids=ids)
def test_every_element_is_written(backend, dtype, shape):
    properties.every_element_is_written(backend, OP, apply_inputs(shape, dtype))


@each_backend
def test_arguments_stay_as_they_are(backend):
    properties.arguments_stay_as_they_are(backend, OP, random())


@each_backend
@pytest.mark.parametrize("dim", (0, 1), ids=("rows", "tokens"))
def test_strides_beyond_32_bits(backend, dim):
    properties.strides_beyond_32_bits(backend, OP, random(torch.bfloat16, T=3), dim)
