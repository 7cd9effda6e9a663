"""jet::dynamic_conv: its calls, arguments, memory. test_sequence_ops.py has what is true of all such ops."""

import subprocess
import sys
import textwrap

import pytest
import torch
from support.arguments import ConvInputs, conv_inputs, cotangents, inputs_of
from support.backends import check_gradients, check_outputs, each_backend
from support.comparison import assert_bitwise, assert_error, assert_outputs
from support.shapes import ConvShape

OP = "dynamic_conv"
F32 = torch.float32


def random(**shape) -> ConvInputs:
    return conv_inputs(ConvShape("", **shape))


# ---- calls, rows and sequences


@each_backend
@pytest.mark.parametrize("W", (2, 3, 4))
@pytest.mark.parametrize("T", (0, 1, 2, 3, 4))
@pytest.mark.parametrize("op", ("dynamic_conv", "apply_dynamic_conv"))
def test_a_short_call_shifts_the_state(backend, op, T, W):
    """A call of 2 or 3 tokens with an existing state shifts it; it is not overwritten."""
    inputs = inputs_of(op, ConvShape("", T=T, W=W))
    conv_state = backend(op, *inputs)[1]
    history = torch.cat([inputs.conv_state, inputs.x.mT], -1)
    assert_bitwise(conv_state, history[..., history.shape[-1] - (W - 1) :], "conv_state")


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


# Tiles of 32 tokens, 16 channels and 32 columns of hidden: whole ones, with tails in every dimension, and boundaries of
# sequences within one; more tokens than the hidden rows that are packed at a time.
TILES = (
    {"T": 64, "D": 256, "R": 64},
    {"T": 33, "D": 17, "R": 33},
    {"T": 100, "D": 152, "R": 95, "bias": False, "state": False},
    {"B": 1, "T": 200, "D": 48, "R": 31, "cu_seqlens": (0, 0, 1, 4, 4, 68, 132, 133, 200, 200)},
    {"B": 3, "T": 1700, "D": 16, "R": 32, "silu": False},
)


@each_backend
@pytest.mark.parametrize("strided", (False, True), ids=("dense", "strided"))
@pytest.mark.parametrize("W", (2, 3, 4))
@pytest.mark.parametrize("shape", TILES, ids=str)
def test_tiles_in_bf16(backend, shape, W, strided):
    inputs = conv_inputs(ConvShape("", W=W, **shape), torch.bfloat16)
    if strided:  # x as rows of a fused projection, hidden transposed
        x = torch.cat([inputs.hidden, inputs.x], -1)[..., inputs.hidden.shape[-1] :]
        inputs = inputs._replace(x=x, hidden=inputs.hidden.mT.contiguous().mT)
    check_outputs(backend, OP, inputs)


# ---- memory


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
