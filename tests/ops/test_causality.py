"""A token changes nothing that comes before it, whatever it holds; after it, outputs are those of the token loop."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arguments import (
    TOKENS,
    ApplyInputs,
    ConvInputs,
    DeltaInputs,
    apply_inputs,
    conv_inputs,
    delta_inputs,
    recurrent_call,
)
from support.backends import OPS, OpsBackend, each_backend
from support.comparison import TOLERANCE, assert_bitwise, assert_error
from support.device_backends import each_device, each_machine
from support.draft_properties import verify
from support.pool_properties import run
from support.shapes import ConvShape, DeltaShape
from support.strategies import conv_shapes, delta_shapes, seeds
from torch import Tensor

from reference.recurrent_gated_delta_rule import gated_delta_rule

CHUNK = "chunk_gated_delta_rule"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NOT_FINITE = (math.nan, math.inf, -math.inf)


def names_of(inputs: NamedTuple) -> list[str]:
    return [name for name in inputs._fields if name in TOKENS]


def with_value(inputs: NamedTuple, name: str, row: int, token: int, value: float, column: int = 0) -> NamedTuple:
    """One number of an argument replaced."""
    changed = getattr(inputs, name).clone()
    changed[row, token].view(-1)[column % changed[row, token].numel()] = value
    return inputs._replace(**{name: changed})


def with_other_future(inputs: NamedTuple, token: int, value: float, seed: int) -> NamedTuple:
    """Every argument from `token` on replaced: by `value`, or where that is 0 by other random numbers."""
    generator = torch.Generator().manual_seed(seed)

    def future(name: str, t: Tensor) -> Tensor:
        changed = t.clone()
        noise = torch.randn(changed[:, token:].shape, generator=generator, dtype=torch.float64).mul(3).to(t.dtype)
        changed[:, token:] = noise + value
        if name == "g":
            changed[:, token:] = -noise.abs() if value == 0 else math.nan if math.isnan(value) else -math.inf
        return changed

    return inputs._replace(**{name: future(name, getattr(inputs, name)) for name in names_of(inputs)})


def assert_past_is_kept(backend: OpsBackend, out: Tensor, clean: Tensor, token: int, what: str, ceiling: float) -> None:
    """Outputs [B, T, ...] before `token`."""
    assert out[:, :token].isfinite().all(), f"{what}: not finite before token {token}"
    assert_error(what, out[:, :token], clean[:, :token], ceiling)


def assert_same_pattern(out: Tensor, expected: Tensor, ceiling: float, what: str) -> None:
    """Not finite in the same places, and equal in the others."""
    assert torch.equal(out.isfinite(), expected.isfinite()), (
        f"{what}: not finite in {out.isfinite().logical_not().sum()} places"
    )
    where = expected.isfinite()
    assert_error(what, out[where], expected[where], ceiling)


# ---- the chunked delta rule


@each_backend
@settings(max_examples=20)
@given(
    data=st.data(),
    shape=delta_shapes(),
    dtype=st.sampled_from((F32, BF16)),
    seed=seeds,
    value=st.sampled_from(NOT_FINITE),
)
def test_chunked_outputs_are_those_of_the_token_loop(backend, data, shape, dtype, seed, value):
    """Also where a number is not finite: the same outputs and columns of the state are not, and the others keep their
    values.
    """
    if shape.T == 0:
        return
    inputs = delta_inputs(shape, dtype, seed)
    name, row, token = (
        data.draw(st.sampled_from(names_of(inputs))),
        data.draw(st.integers(0, shape.B - 1)),
        data.draw(st.integers(0, shape.T - 1)),
    )
    bad = with_value(inputs, name, row, token, math.nan if name == "g" else value, data.draw(st.integers(0, 40)))
    for what, out, expected in zip(("o", "final_state"), backend(CHUNK, *bad), gated_delta_rule(*bad)):
        assert_same_pattern(out, expected, TOLERANCE[dtype].output, f"{name} of token {token} is {value}: {what}")


@each_backend
@pytest.mark.parametrize("value", (*NOT_FINITE, 0.0), ids=str)
@pytest.mark.parametrize("token", (1, 5, 63, 64, 70, 129))
def test_chunked_outputs_do_not_see_the_future(backend, token, value):
    inputs = delta_inputs(DeltaShape("", B=2, T=130, Hk=2, H=4, K=8, V=12), F32)
    clean, _ = backend(CHUNK, *inputs)
    out, _ = backend(CHUNK, *with_other_future(inputs, token, value, seed=token))
    assert_past_is_kept(backend, out, clean, token, "o", 1e-6)
    if backend.name == "ops":
        assert_bitwise(out[:, :token], clean[:, :token], "the CPU kernel makes each row's sums for itself")


@pytest.mark.parametrize("value", (*NOT_FINITE, 0.0), ids=str)
@pytest.mark.parametrize("token", (1, 31, 63, 64, 70, 129))
def test_wide_chunked_outputs_do_not_see_the_future(token, value):
    """Shapes that the CPU computes in tiles where it has some, which have a future beside each triangle."""
    inputs = delta_inputs(DeltaShape("", B=2, T=130, Hk=1, H=2, K=64, V=128), BF16)
    out, clean = (OPS(CHUNK, *x)[0] for x in (with_other_future(inputs, token, value, seed=token), inputs))
    assert_bitwise(out[:, :token], clean[:, :token], "the CPU kernel makes each row's sums for itself")


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
@pytest.mark.parametrize("name", ("q", "k", "v", "g", "beta", "initial_state"))
@pytest.mark.parametrize("bits", (0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000), ids=hex)
def test_any_bits_of_a_nan_are_a_nan(name, dtype, bits):
    """Of what a GPU gives, of poisoned memory, of one that signals, of PyTorch's."""
    inputs = delta_inputs(DeltaShape("", T=100, Hk=1, H=1, K=64, V=64), dtype)
    changed = getattr(inputs, name).clone()
    half = {BF16: bits >> 16 | 0x40, F16: bits >> 16 | 0x7C40}[dtype] & 0xFFFF
    half -= (half & 0x8000) << 1
    raw, value = (torch.int32, bits) if changed.dtype == F32 else (torch.int16, half)
    changed.view(raw)[0, 40 if name != "initial_state" else 0].view(-1)[3 % changed[0, 0].numel()] = value
    bad = inputs._replace(**{name: changed})
    assert changed.isnan().sum() == 1
    for what, out, expected in zip(("o", "final_state"), OPS(CHUNK, *bad), gated_delta_rule(*bad)):
        assert_same_pattern(out, expected, TOLERANCE[dtype].output, f"{name}: {what}")


@each_backend
def test_numbers_that_overflow_on_the_way_stay_in_their_column(backend):
    """Finite inputs whose state is not: from that token on, in that column."""
    inputs = delta_inputs(DeltaShape("", T=70, H=1, l2norm=False), F32)
    bad = with_value(with_value(inputs, "v", 0, 40, 3e38, 3), "beta", 0, 40, 100.0)
    o, state = backend(CHUNK, *bad)
    assert not o[0, 40:, 0, 3].isfinite().any() and not state[0, 0, :, 3].isfinite().any()
    clean, clean_state = backend(CHUNK, *with_value(inputs, "beta", 0, 40, 100.0))
    others = [column for column in range(12) if column != 3]
    assert_error("o before", o[:, :40], clean[:, :40], 1e-6)
    assert_error("other columns", o[..., others], clean[..., others], 1e-5)
    assert_error("their states", state[..., others], clean_state[..., others], 1e-5)


@each_backend
def test_gradients_of_tokens_that_do_not_meet_a_nan_are_kept(backend):
    """v is NaN behind token 40, whose outputs have no cotangent: padding of any content."""
    inputs = delta_inputs(DeltaShape("", T=70, K=8, V=12), F32)
    bad = inputs._replace(v=inputs.v.clone())
    bad.v[:, 40:] = math.nan
    grads = torch.randn(inputs.v.shape).index_fill_(1, torch.arange(40, 70), 0), None
    clean, dirty = (backend.gradients(CHUNK, x, grads) for x in (inputs, bad))
    for name in ("q", "k", "v", "g", "beta"):
        assert_error(f"d{name}", dirty[name][:, :40], clean[name][:, :40], 1e-5)


@pytest.mark.parametrize("token", (1, 40, 64, 69))
def test_gradients_do_not_see_cotangents_of_earlier_outputs(token):
    """Of the CPU kernels; the plain backward multiplies zeros by them within a chunk."""
    backend = OPS
    inputs = delta_inputs(DeltaShape("", T=70, K=8, V=12), F32)
    grads = torch.randn(inputs.v.shape), torch.randn(inputs.initial_state.shape)
    bad = grads[0].clone()
    bad[0, token - 1, 0, 3] = math.nan
    clean, dirty = (backend.gradients(CHUNK, inputs, (grad_o, grads[1])) for grad_o in (grads[0], bad))
    for name in ("q", "k", "v", "g", "beta"):
        assert_error(f"d{name}", dirty[name][:, token:], clean[name][:, token:], 1e-5)
    assert_error("dv of other columns", dirty["v"][..., 4:], clean["v"][..., 4:], 1e-5)


# ---- on a device

DEVICE_SHAPE = DeltaShape("", T=80, H=1, K=64, V=144)


def check_on_device(backend: OpsBackend, inputs: DeltaInputs, what: str) -> None:
    for name, out, expected in zip(("o", "final_state"), backend(CHUNK, *inputs), gated_delta_rule(*inputs)):
        assert_same_pattern(out, expected, 2.5e-3, f"{what}: {name}")


@each_device
@pytest.mark.parametrize(
    "name, value",
    (("q", math.nan), ("k", math.nan), ("v", math.nan), ("v", math.inf), ("g", math.nan), ("beta", math.nan)),
)
def test_device_outputs_are_those_of_the_token_loop(backend, name, value):
    inputs = delta_inputs(DEVICE_SHAPE, BF16)
    check_on_device(backend, with_value(inputs, name, 0, 70, value, column=5), f"{name} of token 70")


@each_device
def test_device_sequences_with_a_nan_each(backend):
    """In v of one head, in k of another sequence; the empty ones and the last keep their bits."""
    inputs = delta_inputs(DeltaShape("", T=140, H=2, Hk=2, K=64, V=16, cu_seqlens=(0, 0, 70, 70, 100, 140)), F16)
    bad = with_value(with_value(inputs, "v", 0, 30, math.nan, 16), "k", 0, 80, math.nan, 64)
    check_on_device(backend, bad, "packed")
    (o, state), (clean, clean_state) = backend(CHUNK, *bad), backend(CHUNK, *inputs)
    assert_bitwise(o[:, 100:], clean[:, 100:], "the last sequence")
    assert_bitwise(state[[0, 2, 4]], clean_state[[0, 2, 4]], "states of the empty ones and the last")


@each_machine
def test_device_segments_with_a_nan(backend):
    """A sequence that is cut: the outputs of all of its segments are made again."""
    inputs = delta_inputs(DeltaShape("", T=3200, H=1, Hk=1, K=64, V=16), BF16)
    bad = with_value(inputs, "v", 0, 1800, math.nan, 3)
    o, state = backend(CHUNK, *bad)
    clean, clean_state = backend(CHUNK, *inputs)
    others = [column for column in range(16) if column != 3]
    assert not o[0, 1800:, 0, 3].isfinite().any() and not state[0, 0, :, 3].isfinite().any()
    assert_error("o before", o[:, :1800], clean[:, :1800], 2.5e-3)
    assert_bitwise(o[..., others], clean[..., others], "other columns")
    assert_bitwise(state[..., others], clean_state[..., others], "their states")


@each_device
def test_device_values_beyond_fp16(backend):
    """In a column whose numbers fp16 does not hold all is made again in fp32."""
    inputs = delta_inputs(DEVICE_SHAPE, BF16)
    check_on_device(backend, with_value(inputs, "v", 0, 70, 3e6, column=1), "v = 3e6")


# ---- the other ops


def check_drafts(backend: OpsBackend, shape: DeltaShape, dtype: torch.dtype, token: int, value: float) -> None:
    """recurrent_gated_delta_rule and its verify."""
    call = recurrent_call(shape, dtype)
    other = with_other_future(call, token, value, seed=token)
    assert_bitwise(run(backend, other)[0][:, :token], run(backend, call)[0][:, :token], "recurrent")
    for name, out, clean in zip(("o", "keys", "updates"), verify(backend, other), verify(backend, call)):
        assert_bitwise(out[:, :token], clean[:, :token], f"{name} of verify")


@each_backend
@pytest.mark.parametrize("value", (*NOT_FINITE, 0.0), ids=str)
@pytest.mark.parametrize("token", (1, 4, 17))
def test_drafts_do_not_see_the_future(backend, token, value):
    check_drafts(backend, DeltaShape("", B=3, T=18, H=2, K=12, V=20), F32, token, value)


@each_device
@pytest.mark.parametrize("value", (math.nan, 0.0), ids=str)
def test_device_drafts_do_not_see_the_future(backend, value):
    check_drafts(backend, DeltaShape("", B=2, T=9, H=2, K=64, V=32), BF16, 4, value)


def check_conv(backend: OpsBackend, op: str, inputs: ConvInputs | ApplyInputs, token: int, value: float) -> None:
    clean, _ = backend(op, *inputs)
    out, _ = backend(op, *with_other_future(inputs, token, value, seed=token))
    assert_past_is_kept(backend, out, clean, token, op, 1e-6 if clean.dtype == F32 else 1e-3)


@each_backend
@settings(max_examples=20)
@given(data=st.data(), shape=conv_shapes(), value=st.sampled_from((*NOT_FINITE, 0.0)), seed=seeds)
def test_convolutions_do_not_see_the_future(backend, data, shape, value, seed):
    if shape.T < 2:
        return
    token = data.draw(st.integers(1, shape.T - 1))
    check_conv(backend, "dynamic_conv", conv_inputs(shape, F32, seed), token, value)
    check_conv(backend, "apply_dynamic_conv", apply_inputs(shape, F32, seed), token, value)


@each_device
@pytest.mark.parametrize("op, make", (("dynamic_conv", conv_inputs), ("apply_dynamic_conv", apply_inputs)))
@pytest.mark.parametrize("token", (1, 70))
def test_device_convolutions_do_not_see_the_future(backend, op, make, token):
    check_conv(backend, op, make(ConvShape("", B=1, T=140, D=40, R=64), BF16), token, math.nan)
