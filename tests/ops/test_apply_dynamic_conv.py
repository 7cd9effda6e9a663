"""jet::apply_dynamic_conv beside jet::dynamic_conv. test_sequence_ops.py has what is true of all such ops."""

import pytest
import torch
from support.arguments import conv_inputs
from support.backends import each_backend
from support.comparison import assert_outputs
from support.shapes import CONV_SHAPES, ids

from reference.dynamic_conv import generate_taps

F32, F64 = torch.float32, torch.float64


@each_backend
@pytest.mark.parametrize("dtype", (F32, F64), ids=ids)
@pytest.mark.parametrize("shape", CONV_SHAPES, ids=ids)
def test_equals_dynamic_conv_with_the_kernels_it_would_generate(backend, dtype, shape):
    inputs = conv_inputs(shape, dtype)
    kernels = generate_taps(inputs.hidden, inputs.weight, inputs.bias, shape.D)
    explicit = backend("apply_dynamic_conv", inputs.x, kernels, inputs.conv_state, inputs.cu_seqlens, inputs.silu)
    assert_outputs(explicit, backend("dynamic_conv", *inputs), dtype)
