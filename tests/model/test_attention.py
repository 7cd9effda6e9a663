"""Attention: any split of a prompt, windows, NaN, gradients, one-token steps; few calls and small masks."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.model_cases import WINDOW, boundaries, small_config, stir_
from torch.utils._python_dispatch import TorchDispatchMode

from jetkernels.model import attention as attention_module
from jetkernels.model.attention import (
    Attention,
    SlidingWindowAttention,
    causal_attention,
    finite_attention,
    rotary_table,
    rotate,
)
from jetkernels.model.layout import TokenLayout

THETA = 1e6
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
# Splits of T tokens at the borders of a window of W, alone and after some of the window.
W = 11
BORDERS = [1, W - 1, W, W + 1, 2 * W, 3 * W - 1]


def close(got, need, atol=1e-12):
    torch.testing.assert_close(got, need, atol=atol, rtol=0)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(N, T, L, group=2, Hkv=2, d=8, seed=0, dtype=torch.float64):
    q = draw(N, T, group * Hkv, d, seed=seed, dtype=dtype).transpose(1, 2)
    return q, *(draw(N, Hkv, L, d, seed=seed + i, dtype=dtype) for i in (1, 2))


def visible(T, L, window=None):
    distance = torch.arange(L - T, L)[:, None] - torch.arange(L)
    return (distance >= 0) & (distance < (L if window is None else window))


def masked(q, k, v, window=None):
    """The definition: all scores, one mask."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~visible(q.shape[2], k.shape[2], window), -torch.inf).softmax(-1) @ v


def blocks_of(size):
    return mock.patch.object(attention_module, "BLOCK", size)


class Operations(TorchDispatchMode):
    """Counts calls of attention and the bytes of its largest mask; refuses whatever asks the device for a value."""

    def __init__(self, reads=True):
        super().__init__()
        self.calls, self.mask_bytes, self.reads = 0, 0, reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert self.reads or name not in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"), name
        if func is FLASH:
            mask = (kwargs or {}).get("attn_mask")
            self.calls += 1
            self.mask_bytes = max(self.mask_bytes, 0 if mask is None else mask.untyped_storage().nbytes())
        return func(*args, **(kwargs or {}))


# ---- the functions


@given(
    T=st.integers(1, 40),
    past=st.integers(0, 30),
    window=st.none() | st.integers(1, 45),
    block=st.sampled_from([1, 3, 4, 16, 256]),
    N=st.integers(1, 3),
    group=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_attention_is_its_definition(T, past, window, block, N, group, seed):
    q, k, v = inputs(N, T, past + T, group, seed=seed)
    with torch.no_grad(), blocks_of(block):
        close(finite_attention(q, k, v, window), masked(q, k, v, window))


@pytest.mark.parametrize("T", BORDERS)
@pytest.mark.parametrize("past", [0, 1, W - 1, W, W + 1, 3 * W])
@pytest.mark.parametrize("block", [4, W, 256])
def test_borders_of_a_window(T, past, block):
    q, k, v = inputs(2, T, past + T)
    with blocks_of(block):
        close(finite_attention(q, k, v, W), masked(q, k, v, W))


@pytest.mark.parametrize("T", [1151, 1152, 1153, 1408, 1409, 3455])
def test_the_real_window(T):
    q, k, v = inputs(1, T, T, group=1, Hkv=1)
    close(finite_attention(q, k, v, 1152), masked(q, k, v, 1152))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("T, past, window", [(300, 0, 40), (300, 40, 40), (300, 500, None), (7, 1000, None)])
def test_low_precision(dtype, bound, T, past, window):
    q, k, v = inputs(2, T, past + T, group=3, d=64, dtype=dtype)
    got, need = finite_attention(q, k, v, window), masked(q.double(), k.double(), v.double(), window)
    assert got.dtype == dtype and (got - need).norm() < bound * need.norm()


@given(
    T=st.integers(1, 30),
    past=st.integers(0, 20),
    window=st.none() | st.integers(1, 25),
    block=st.sampled_from([2, 5, 256]),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_what_is_not_finite_reaches_only_who_sees_it(T, past, window, block, bad, data):
    L = past + T
    q, k, v = inputs(2, T, L)
    need = masked(q, k, v, window)
    at = data.draw(st.integers(0, L - 1))
    data.draw(st.sampled_from([k, v]))[1, 1, at, 3] = bad
    with blocks_of(block):
        got = causal_attention(q, k, v, window)
    seen = visible(T, L, window)[:, at]
    assert got[1, :, seen].isnan().all()
    close(got[1, :, ~seen], need[1, :, ~seen])
    close(got[0], need[0])


@given(
    T=st.integers(1, 24),
    past=st.integers(0, 9),
    window=st.none() | st.integers(1, 20),
    block=st.sampled_from([3, 256]),
)
@settings(max_examples=60, deadline=None)
def test_gradients(T, past, window, block):
    tensors = [t.requires_grad_() for t in inputs(2, T, past + T, group=3)]
    weight = draw(2, 6, T, 8, seed=9)
    with blocks_of(block):
        got = torch.autograd.grad((causal_attention(*tensors, window) * weight).sum(), tensors)
    for g, n in zip(got, torch.autograd.grad((masked(*tensors, window) * weight).sum(), tensors)):
        close(g, n)


def test_a_long_window_is_three_calls_and_one_small_mask():
    T, window, group = 8192 + 77, 1152, 2
    q, k, v = inputs(1, T, T, group, Hkv=1, dtype=torch.float32)
    with Operations() as count:
        causal_attention(q, k, v, window)
    assert count.calls == 3 and count.mask_bytes == group * 256 * (256 + window) * 4


@pytest.mark.parametrize("N, T, past", [(1, 512, 4096), (2, 65, 1), (2, 1, 100), (2, 100, 0)])
def test_a_past_needs_no_mask(N, T, past):
    q, k, v = inputs(N, T, past + T, dtype=torch.float32)
    with Operations() as count:
        finite_attention(q, k, v)
    assert count.calls <= 2 and count.mask_bytes == 0


@pytest.mark.parametrize("past, window", [(6, None), (0, 5), (5, 5)])
def test_compiled(past, window):
    q, k, v = inputs(2, 20, past + 20)
    compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    with blocks_of(4):
        close(compiled(q, k, v, window), masked(q, k, v, window))


# ---- rotation


@given(
    T=st.integers(0, 600),
    start=st.integers(0, 100_000),
    half=st.integers(1, 9),
    grad=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_rotation_rounds_once(T, start, half, grad, seed):
    cos, sin = rotary_table(start + torch.arange(T)[None], 2 * half, THETA)
    x = draw(2, T, 3, 2 * half, seed=seed, dtype=torch.bfloat16).requires_grad_(grad)
    first, second = x.double().chunk(2, -1)
    c, s = cos[..., :half].double(), sin[..., :half].double()
    need = torch.cat((first * c - second * s, second * c + first * s), -1)
    terms = torch.cat(((first * c).abs() + (second * s).abs(), (second * c).abs() + (first * s).abs()), -1)
    got = rotate(x, cos, sin)
    half_unit = torch.ldexp(torch.ones_like(need), torch.frexp(need).exponent - 9)
    assert got.dtype == x.dtype and ((got - need).abs() <= half_unit + terms * 2**-22).all()
    # A view of a wider projection, and fp64.
    wide = torch.cat((x, x), 2).detach()
    assert torch.equal(rotate(wide[:, :, 3:], cos, sin), rotate(x.detach(), cos, sin))
    close(rotate(x.double(), cos, sin), need)


def test_rotation_has_a_gradient():
    cos, sin = rotary_table(torch.arange(5)[None], 8, THETA)
    x = draw(2, 5, 3, 8).requires_grad_()
    torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (x,))


# ---- the layers


def small_layer(kind, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cls = {"attn": Attention, "swa": SlidingWindowAttention}[kind]
        return stir_(cls(small_config((kind,)))).to(dtype)


def new_state(kind, N, max_length, dtype=torch.float64):
    cls = {"attn": Attention, "swa": SlidingWindowAttention}[kind]
    return cls.initial_state(small_config((kind,)), N, max_length, dtype=dtype)


def call(layer, rows, past=None, state=None):
    """Of rows [t, C] after past[n] tokens each; packed unless they are equally long."""
    new = [len(row) for row in rows]
    past_device = None if state is None else torch.tensor(past)
    past = past or [0] * len(rows)
    if len(set(new)) == 1:
        layout = TokenLayout.dense(len(rows), new[0], past, past_device, "cpu")
        x = torch.stack(rows)
    else:
        layout = TokenLayout.packed(new, boundaries(new), past, past_device)
        x = torch.cat(rows)[None]
    y = layer(x, layout=layout, rotary=rotary_table(layout.positions, layer.head_dim, THETA), state=state)
    return list(y) if layout.is_dense else list(y[0].split(new))


@given(
    kind=st.sampled_from(["attn", "swa"]),
    calls=st.lists(st.lists(st.integers(0, 2 * WINDOW + 2), min_size=3, max_size=3), min_size=1, max_size=5),
    equal=st.booleans(),
    steps=st.integers(0, 2 * WINDOW),
    block=st.sampled_from([2, 3, 256]),
)
@settings(max_examples=120, deadline=None)
@torch.no_grad()
def test_any_split_is_one_call(kind, calls, equal, steps, block):
    """Ragged or equal pieces of three sequences, some empty, then single tokens by `step`."""
    layer = small_layer(kind)
    if equal:
        calls = [[new[0]] * 3 for new in calls]
    lengths = [sum(new) for new in zip(*calls)]
    rows = [draw(length + steps, 32, seed=n) for n, length in enumerate(lengths)]
    state = new_state(kind, 3, max(lengths) + steps + 1)
    past, got = [0, 0, 0], [[], [], []]
    with blocks_of(block):
        for new in calls:
            for n, y in enumerate(call(layer, [r[p : p + t] for r, p, t in zip(rows, past, new)], past, state)):
                got[n].append(y)
            past = [p + t for p, t in zip(past, new)]
        for i in range(steps):
            at = torch.tensor(lengths) + i
            cos, sin = (t[:, 0] for t in rotary_table(at, layer.head_dim, THETA))
            y = layer.step(torch.stack([r[p] for r, p in zip(rows, at)]), lengths=at, rotary=(cos, sin), state=state)
            for n in range(3):
                got[n].append(y[n : n + 1])
    for parts, row in zip(got, rows):
        if len(row):
            close(torch.cat(parts), call(layer, [row])[0])


@pytest.mark.parametrize("kind", ["attn", "swa"])
@torch.no_grad()
def test_a_step_is_a_call_of_one_token(kind):
    layer = small_layer(kind)
    rows = [draw(t + 1, 32, seed=t) for t in (9, 0, 4)]
    states = [new_state(kind, 3, 12) for _ in range(2)]
    past = [9, 0, 4]
    for state in states:
        call(layer, [row[:-1] for row in rows], [0, 0, 0], state)
    need = torch.cat(call(layer, [row[-1:] for row in rows], past, states[0]))
    lengths = torch.tensor(past)
    cos, sin = (t[:, 0] for t in rotary_table(lengths, layer.head_dim, THETA))
    with Operations(reads=False):
        got = layer.step(torch.stack([r[-1] for r in rows]), lengths=lengths, rotary=(cos, sin), state=states[1])
    assert got.shape == (3, 32) and torch.equal(got, need)
    assert all(map(torch.equal, *states))


@pytest.mark.parametrize("kind", ["attn", "swa"])
@torch.no_grad()
def test_a_step_leaves_negative_lengths_alone(kind):
    layer, state = small_layer(kind), new_state(kind, 3, 12)
    call(layer, [draw(4, 32, seed=n) for n in range(3)], [0, 0, 0], state)
    before = [t.clone() for t in state]
    lengths, x = torch.tensor([4, -1, 4]), draw(3, 32, seed=7)
    x[1] = math.nan
    cos, sin = (t[:, 0] for t in rotary_table(lengths, layer.head_dim, THETA))
    y = layer.step(x, lengths=lengths, rotary=(cos, sin), state=state)
    assert not y[1].any() and y[[0, 2]].isfinite().all()
    for old, new in zip(before, state):
        assert torch.equal(new[1], old[1]) and not torch.equal(new[0], old[0])


def test_a_step_computes_no_gradient():
    layer, state = small_layer("attn"), new_state("attn", 1, 4)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name == "k_proj.weight")
    cos, sin = (t[:, 0] for t in rotary_table(torch.tensor([0]), layer.head_dim, THETA))
    with pytest.raises(RuntimeError, match="Attention: a call with a cache computes no gradient"):
        layer.step(draw(1, 32), lengths=torch.tensor([0]), rotary=(cos, sin), state=state)
    assert not state.key.any()


@pytest.mark.parametrize("kind", ["attn", "swa"])
@torch.no_grad()
def test_ragged_pieces_need_few_calls_and_no_masks_of_a_past(kind):
    layer, state = small_layer(kind), new_state(kind, 3, 60)
    call(layer, [draw(t, 32) for t in (30, 2, 11)], [0, 0, 0], state)
    with Operations() as count:
        call(layer, [draw(t, 32) for t in (9, 20, 0)], [30, 2, 11], state)
    assert count.calls <= 6 and (kind == "swa" or count.mask_bytes == 0)


@pytest.mark.parametrize("kind", ["attn", "swa"])
@torch.no_grad()
def test_autocast_with_a_cache(kind):
    """A cache of fp32, calls in bf16."""
    layer, row = small_layer(kind, torch.float32), draw(23, 32, dtype=torch.float32)
    need = call(layer, [row])[0]
    state = new_state(kind, 1, 23, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [call(layer, [row[a:b]], [a], state)[0] for a, b in ((0, 8), (8, 9), (9, 23))]
    got = torch.cat(parts)
    assert got.dtype == torch.bfloat16 and state.key.dtype == torch.float32
    assert (got - need).norm() < 0.02 * need.norm()
