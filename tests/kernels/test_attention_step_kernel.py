"""The Hopper kernel of attention_step: its properties on the simulator and on a GPU, its cost, its machine code."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import attention_cases as cases
from support.arguments import AttentionCall, attention_call
from support.attention_cases import run
from support.device_backends import EARLY, assert_every_schedule_agrees, each_device, each_machine, hoppersim, simulated
from support.kernel_code import disassembly, report
from support.layouts import far_apart, laid_out
from support.shapes import AttentionShape, ids
from support.strategies import seeds

BF16, F16 = torch.bfloat16, torch.float16
each_dtype = pytest.mark.parametrize("dtype", (BF16, F16), ids=ids)
each_which = pytest.mark.parametrize("which", ("key", "value"))
SHAPES = (
    AttentionShape("empty caches, and none", (0, -1, 3), d=64),
    AttentionShape("a full ring", (70, 64, 200), d=64, L=70),
    AttentionShape("a slot", (0, 1, 7), d=64, L=1),
    AttentionShape("lengths of 64 bits", (-(2**63), 2**62), d=64),
    *(AttentionShape(f"group {G}", (75, 16), H=G, Hkv=1, d=64, L=80) for G in (1, 2, 7, 8, 9, 16)),
    *(AttentionShape(f"d = {d}", (75, 16), H=4, Hkv=2, d=d, L=80) for d in (64, 128, 256)),
    *(AttentionShape(f"{n + 1} keys", (n,), H=2, Hkv=1, d=64, L=600) for n in (14, 15, 16, 63, 64, 255, 256, 511, 512)),
    AttentionShape("the model's heads, ragged", (1100, 3, 1151), H=12, d=128, L=1152),
    AttentionShape("wide groups and several splits", (700, 255), H=16, Hkv=1, d=128, L=800),
)


@each_device
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_equals_the_reference(backend, dtype, shape):
    cases.check(backend, attention_call(shape, dtype))


@st.composite
def calls(draw) -> AttentionCall:
    """Any call that the kernel takes, small."""
    Hkv, L = draw(st.integers(1, 3)), draw(st.sampled_from((1, 16, 63, 130, 300)))
    lengths = draw(st.lists(st.integers(-2, 2 * L + 1), min_size=1, max_size=3))
    d = draw(st.sampled_from((64, 128, 256)))
    shape = AttentionShape("", tuple(lengths), Hkv * draw(st.integers(1, 16)), Hkv, d, L)
    call = attention_call(shape, draw(st.sampled_from((BF16, F16))), draw(seeds))
    layouts = draw(
        st.lists(st.sampled_from(("contiguous", "padded", "stepped", "reversed dims")), min_size=5, max_size=5)
    )
    tokens = [laid_out(t, layout) for t, layout in zip(call, layouts)]
    dims = draw(st.sampled_from(((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3))))
    key, value = (cases.strided(t, dims) for t in (call.key, call.value))
    scale = draw(st.sampled_from((0.0, 0.1, -0.2)))
    return AttentionCall(
        *tokens, key, value, laid_out(call.lengths, draw(st.sampled_from(("contiguous", "stepped")))), scale
    )


@each_device
@settings(max_examples=8)
@given(call=calls())
def test_any_call(backend, call):
    cases.check(backend, call)


@each_device
@each_dtype
def test_unread_slots_do_not_matter(backend, dtype):
    for shape in (AttentionShape("", d=64), AttentionShape("", (70, 200, 290), d=64, L=300)):
        cases.unread_slots_do_not_matter(backend, shape, dtype)


@each_device
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
def test_nan_stays_in_its_sequence(backend, value):
    call = attention_call(AttentionShape("", (70, 12, 299), d=64, L=320), BF16, dirty=False)
    for n in range(3):
        cases.nan_stays_in_its_sequence(backend, call, n, value)


@each_device
@each_which
def test_one_bad_slot_reaches_its_group_alone(backend, which):
    cases.one_bad_slot_reaches_its_group_alone(
        backend, attention_call(AttentionShape("", (600, 3), d=64, L=700), BF16), which
    )


@each_device
def test_every_element_is_written(backend):
    cases.every_element_is_written(backend, attention_call(AttentionShape("", (600, 0, -1), d=64, L=700), BF16))


@each_device
@pytest.mark.parametrize("L", (24, 7))
def test_steps_are_causal_attention(backend, L):
    cases.steps_are_causal_attention(backend, BF16, 24, L, 1e-2)


@each_machine
@each_which
def test_strides_beyond_32_bits(backend, which):
    call = attention_call(AttentionShape("", (4, 5), d=64, L=7), BF16)
    expected = run(backend, call)
    for dim in (0, 1, 2):
        far = call._replace(**{w: getattr(call, w).clone() for w in ("key", "value")})
        far = far._replace(**{which: far_apart(getattr(call, which), dim)})
        cases.assert_bitwise(backend(cases.OP, *far), expected[0], "o")
        cases.assert_bitwise(getattr(far, which), expected[1 if which == "key" else 2], which)


@simulated
@pytest.mark.parametrize(
    "shape", (AttentionShape("", (300, 40), d=64, L=320), AttentionShape("", (80,), H=16, d=128, L=90))
)
def test_every_schedule_agrees(shape):
    assert_every_schedule_agrees(lambda backend: run(backend, attention_call(shape, BF16)))


@simulated
@pytest.mark.parametrize(
    "shape",
    (
        AttentionShape("the model's heads, ragged", (1100, 3, -1, 2000), H=12, d=128, L=1152),
        AttentionShape("sixteen queries", (1000, 500), H=32, d=128, L=1024),
    ),
    ids=ids,
)
def test_every_key_and_value_is_read_once(shape):
    """For all queries of a group, and no slot past the length; the new token is not read back."""
    call = attention_call(shape, BF16)
    o = run(EARLY, call)[0]
    step, combine = hoppersim.launches()
    group, L = shape.H // shape.Hkv, shape.L
    used = [min(n, L - 1) + 1 for n in shape.lengths]
    old = sum(n - 1 for n in used if n > 0) * shape.Hkv * shape.d * 2 * 2
    # q and its angles by each warp of a split, and the new token's; lengths by every thread
    split = 256
    splits = sum(-(-n // split) for n in used) * shape.Hkv
    angles = 8 * shape.d * group * 2
    beside = splits * 4 * (group * shape.d * 2 + angles) + step["grid"][0] * step["grid"][1] * step["grid"][2] * 128 * 8
    token = sum(n > 0 for n in used) * shape.Hkv * (shape.d * 4 + 8 * shape.d * 2)
    counters = step["counters"]
    assert old < counters["global_read_bytes"] <= old + beside + token
    written = sum(n > 0 for n in used) * shape.Hkv * shape.d * 2 * 2 + splits * group * (shape.d + 2) * 4
    assert counters["global_write_bytes"] == written
    assert counters["shared_wavefronts"] <= 1.05 * counters["shared_ideal_wavefronts"]
    tiles = sum(-(-n // 16) for n in used) * shape.Hkv
    assert counters["tensor_flop"] == tiles * 2 * 2 * 16 * 16 * shape.d
    assert combine["counters"]["global_write_bytes"] == o.numel() * 2


def test_no_spills_and_no_local_memory():
    kernels = report("csrc.attention.launch")
    assert len(kernels) == 24, "two kernels, two dtypes, three head dims, two widths of a group"
    for name, facts in kernels.items():
        assert facts.spill_bytes == 0 and facts.stack_bytes == 0, name
    for name, code in disassembly("csrc.attention.launch").items():
        assert not code.uses("LDL", "STL"), name
        if "attention_step_kernel" in name:
            copies = sum(code.count(f"LDGSTS.E.BYPASS.{prefetch}128") for prefetch in ("", "LTC128B."))
            assert copies >= 8, f"{name}: 16 bytes at a time, past the L1"
