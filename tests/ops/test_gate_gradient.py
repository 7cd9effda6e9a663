"""dg of the chunked gated delta rule has a relative accuracy, however strong the decay and whatever mixture of
decays.
"""

import math
from functools import cache

import pytest
import torch
from support.arguments import DeltaInputs, cotangents, delta_inputs
from support.backends import OPS, PLAIN, OpsBackend, each_backend, reference_gradients
from support.comparison import assert_error
from support.shapes import PACKED, DeltaShape, ids
from torch import Tensor

from reference.chunk_gated_delta_rule import chunk_gated_delta_rule_backward as reference_backward

OP = "chunk_gated_delta_rule"
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DECAYS = (-1e-3, -1e-2, -0.1, -1.0, -5.0, -10.0, -20.0, -50.0)
CEILING = 1e-5  # of every dtype: dg is made in fp32 of the rounded inputs, and not rounded to theirs
SHAPES = (
    DeltaShape("two chunks and a ragged third", B=2, T=131, K=32, V=40),
    DeltaShape("without l2norm, without initial state", T=70, K=16, V=24, l2norm=False, state=False),
    DeltaShape("three value heads per key head", T=70, Hk=2, H=6, K=24, V=16),
    DeltaShape("packed, empty sequences among them", T=200, cu_seqlens=PACKED, K=16, V=24),
)


class ReferenceBackend(OpsBackend):
    """The chunked reference, in the dtype of the arithmetic."""

    name = "reference"

    def gradients(self, op, inputs, grads):
        dtype = F64 if inputs.q.dtype == F64 else F32
        return dict(zip(DeltaInputs._fields, reference_backward(*grads, *inputs, dtype=dtype)))


with_reference = pytest.mark.parametrize("backend", (OPS, PLAIN, ReferenceBackend()), ids=lambda backend: backend.name)


@cache
def case(shape: DeltaShape, dtype: torch.dtype, g: float) -> tuple[DeltaInputs, dict[str, Tensor]]:
    """Inputs with one decay everywhere, and fp64 differentiation of the token loop."""
    inputs = delta_inputs(shape, dtype)
    inputs = inputs._replace(g=torch.full_like(inputs.g, g))
    return inputs, reference_gradients(OP, inputs, cotangents(inputs))


def check_dg(backend: OpsBackend, inputs: DeltaInputs, expected: Tensor) -> None:
    found = backend.gradients(OP, inputs, cotangents(inputs))["g"]
    assert_error("dg", found, expected, CEILING if inputs.q.dtype != F64 else 1e-12, floor=0)


@with_reference
@pytest.mark.parametrize("g", DECAYS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_dg_at_every_decay(backend, shape, g):
    inputs, expected = case(shape, F32, g)
    check_dg(backend, inputs, expected["g"])


@with_reference
@pytest.mark.parametrize("dtype", (BF16, F16, F64), ids=ids)
@pytest.mark.parametrize("g", (-1e-3, -5.0, -50.0), ids=str)
def test_dg_of_other_dtypes(backend, dtype, g):
    inputs, expected = case(SHAPES[0], dtype, g)
    check_dg(backend, inputs, expected["g"])


LEVELS = (-1e-2, -3.0, -15.0, -40.0)


@cache
def mixed_case(shape: DeltaShape, dtype: torch.dtype) -> tuple[DeltaInputs, Tensor, Tensor]:
    inputs = delta_inputs(shape, dtype)
    level = torch.tensor([0, 0, 1, 0, 2, 3, 0])[torch.arange(shape.T) % 7][None, :, None].expand_as(inputs.g)
    inputs = inputs._replace(g=torch.tensor(LEVELS)[level])
    return inputs, level, reference_gradients(OP, inputs, cotangents(inputs))["g"]


@each_backend
@pytest.mark.parametrize("dtype", (F32, BF16), ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_weak_decays_do_not_blur_the_gradients_of_strong_ones(backend, shape, dtype):
    """A token that decays by e^-40 beside one that decays by a hundredth: each level has its own accuracy."""
    inputs, level, expected = mixed_case(shape, dtype)
    found = backend.gradients(OP, inputs, cotangents(inputs))["g"]
    for i, g in enumerate(LEVELS):
        assert_error(f"dg at g = {g}", found[level == i], expected[level == i], CEILING, floor=0)


@each_backend
@pytest.mark.parametrize("g", (-1e-2, -1.0), ids=str)
@pytest.mark.parametrize("which", (0, 1), ids=("of the outputs alone", "of the final state alone"))
def test_dg_of_one_cotangent(backend, which, g):
    inputs = delta_inputs(DeltaShape("", T=70), F32)
    inputs = inputs._replace(g=torch.full_like(inputs.g, g))
    grads = tuple(grad if i == which else torch.zeros_like(grad) for i, grad in enumerate(cotangents(inputs)))
    found = backend.gradients(OP, inputs, grads)["g"]
    assert_error("dg", found, reference_gradients(OP, inputs, grads)["g"], CEILING, floor=0)


@with_reference
def test_dg_is_zero_before_anything_is_remembered(backend):
    inputs = delta_inputs(DeltaShape("", T=70, state=False), F32)
    dg = backend.gradients(OP, inputs, cotangents(inputs))["g"]
    assert not dg[:, 0].any() and dg[:, 1:].all()


@with_reference
@pytest.mark.parametrize("g", (0.0, -1e-3, -1.0, -20.0, -50.0, -math.inf), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_every_gradient_equals_that_of_the_token_loop(backend, shape, g):
    inputs, expected = case(shape, F64, g)
    found = backend.gradients(OP, inputs, cotangents(inputs))
    for name, grad in expected.items():
        assert_error(f"d{name}", found[name], grad, 1e-11)


@pytest.mark.parametrize("g", (-1e-3, -1.0, -20.0, -50.0), ids=str)
def test_finite_differences(g):
    """Of the registered op: backward and its registration. At g = 0 a difference would step into g > 0, which is
    refused.
    """
    inputs = delta_inputs(DeltaShape("", T=6, K=3, V=2), F64)
    inputs = inputs._replace(g=torch.full_like(inputs.g, g))
    leaves = [t.clone().requires_grad_() for t in inputs[:6]]
    assert torch.autograd.gradcheck(
        lambda *x: torch.ops.jet.chunk_gated_delta_rule(*x, *inputs[6:]), leaves, eps=1e-6, atol=1e-8, rtol=1e-6
    )
