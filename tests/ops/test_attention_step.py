"""jet::attention_step against its definition, and what callers rely on besides."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import attention_cases as cases
from support.arguments import AttentionCall, attention_call
from support.attention_cases import run
from support.backends import OPS, each_backend, each_dtype
from support.comparison import DTYPES, TOLERANCE, assert_bitwise, assert_error
from support.layouts import LAYOUTS, far_apart, laid_out
from support.shapes import AttentionShape, ids
from support.strategies import seeds
from torch._subclasses import FakeTensorMode

import jetkernels

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SHAPES = (
    AttentionShape("an empty cache", (0,)),
    AttentionShape("a full ring", (12, 25, 11)),
    AttentionShape("a slot", (0, 1, 7), L=1),
    AttentionShape("no sequence there", (-1, -5, -(2**63))),
    AttentionShape("some there", (-1, 3, -1, 2**62)),
    AttentionShape("no sequences", ()),
    AttentionShape("no heads", H=0, Hkv=0),
    AttentionShape("a query per key head", H=3, Hkv=3),
    AttentionShape("the smallest head", d=2),
    AttentionShape("a head of odd halves", d=34),
    *(AttentionShape(f"group {G}", (130, 63), H=G, Hkv=1, d=32, L=150) for G in (1, 2, 3, 4, 5, 7, 8, 11, 16, 17)),
    *(AttentionShape(f"d = {d}", (70, 64), d=d, L=80) for d in (64, 80, 96, 128, 192, 256)),
    *(AttentionShape(f"{n + 1} keys", (n,), H=2, Hkv=1, d=32, L=700) for n in (15, 16, 62, 63, 64, 65, 510, 511, 512)),
    AttentionShape("several pieces", (1600, 3, 700), H=12, d=128, L=1500),
    AttentionShape("the most pieces", (40000,), H=2, Hkv=1, d=32, L=50000),
)
each_which = pytest.mark.parametrize("which", ("key", "value"))


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_equals_the_reference(backend, dtype, shape):
    cases.check(backend, attention_call(shape, dtype))


@st.composite
def shapes(draw) -> AttentionShape:
    Hkv, L = draw(st.integers(1, 3)), draw(st.sampled_from((1, 7, 64, 65, 130, 600)))
    lengths = draw(st.lists(st.integers(-2, 2 * L + 1), min_size=1, max_size=4))
    return AttentionShape(
        "", tuple(lengths), Hkv * draw(st.integers(1, 9)), Hkv, 2 * draw(st.sampled_from((1, 3, 16, 32, 40, 64))), L
    )


@each_backend
@given(
    shape=shapes(),
    dtype=st.sampled_from(DTYPES),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=8, max_size=8),
    scale=st.sampled_from((0.0, 0.1, -0.2, 1.0)),
    seed=seeds,
)
def test_any_shape_dtype_and_layout(backend, shape, dtype, layouts, scale, seed):
    """The caches too may be strided."""
    call = attention_call(shape, dtype, seed)._replace(scale=scale)
    call = AttentionCall(*(laid_out(t, layout) for t, layout in zip(call, layouts)), scale)
    cases.check(backend, call)


@each_backend
@each_dtype
@pytest.mark.parametrize("dims", ((0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 3, 2)), ids=str)
def test_caches_with_other_orders_of_dimensions(backend, dtype, dims):
    call = attention_call(AttentionShape("", (130, 5), d=64, L=150), dtype)
    cases.check(backend, call._replace(key=cases.strided(call.key, dims), value=cases.strided(call.value, dims)))


@each_backend
@each_dtype
def test_unread_slots_do_not_matter(backend, dtype):
    for shape in (AttentionShape("", d=64), AttentionShape("", (70, 200, 513), d=32, L=600), AttentionShape("", d=10)):
        cases.unread_slots_do_not_matter(backend, shape, dtype)


@each_backend
@each_dtype
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
def test_nan_stays_in_its_sequence(backend, dtype, value):
    call = attention_call(AttentionShape("", (70, 12, 600), d=64, L=640), dtype, dirty=False)
    for n in range(3):
        cases.nan_stays_in_its_sequence(backend, call, n, value)


@each_backend
@each_which
def test_one_bad_slot_reaches_its_group_alone(backend, which):
    cases.one_bad_slot_reaches_its_group_alone(backend, attention_call(AttentionShape("", (1100, 3), L=1200)), which)


@each_backend
def test_scores_may_be_large(backend):
    """Sums of exponentials neither overflow nor vanish; a score of -inf has no weight."""
    call = attention_call(AttentionShape("", (600, 64), d=64, L=700))
    for factor in (1e3, -1e3):
        o, ref = run(backend, call._replace(scale=factor))[0], cases.REFERENCE[cases.OP](*call[:8], factor)[0]
        assert_error("o", o, ref, 1e-3)
    key = call.key.clone()
    key[0, :, :520] = 1e30
    call = call._replace(key=key, q=call.q.abs(), cos=torch.ones_like(call.cos), sin=torch.zeros_like(call.sin))
    call = call._replace(scale=-1e30)
    ref = cases.REFERENCE[cases.OP](*call[:8], -1e30)[0]
    assert not ref[0].isnan().any()
    assert_error("o", run(backend, call)[0][0], ref[0], 1e-5)


@each_backend
def test_sequences_alone_give_the_same_bits(backend):
    if backend is OPS:  # PyTorch's products choose their order by the batch
        for dtype in DTYPES:
            call = attention_call(AttentionShape("", (1500, 0, -1, 64, 700), d=64, L=1400), dtype)
            cases.sequences_alone_give_the_same_bits(backend, call)


def test_bits_do_not_depend_on_threads():
    call = attention_call(AttentionShape("", (1500, 0, -1, 64, 700), H=12, d=128, L=1400), BF16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(OPS, call))
    finally:
        torch.set_num_threads(before)
    for outs in results[1:]:
        for out, expected in zip(outs, results[0]):
            assert_bitwise(out, expected)


@each_backend
def test_every_element_is_written(backend):
    cases.every_element_is_written(backend, attention_call(AttentionShape("", (1500, 0, -1), d=34, L=1400)))


@each_backend
@each_dtype
@pytest.mark.parametrize("L", (40, 7))
def test_steps_are_causal_attention(backend, dtype, L):
    # keys are rounded once more than in one call of attention
    cases.steps_are_causal_attention(backend, dtype, 40, L, 2 * TOLERANCE[dtype].output)


@each_backend
@each_which
@pytest.mark.parametrize("dim", (0, 1, 2))
def test_strides_beyond_32_bits(backend, which, dim):
    call = attention_call(AttentionShape("", (4, 5), d=64, L=7), BF16)
    expected = run(backend, call)
    far = call._replace(**{which: far_apart(getattr(call, which), dim)})
    out = backend(cases.OP, *far._replace(**{w: getattr(call, w).clone() for w in {"key", "value"} - {which}}))
    assert_bitwise(out, expected[0], "o")
    assert_bitwise(getattr(far, which), expected[1 if which == "key" else 2], which)


@each_backend
def test_only_the_caches_are_written(backend):
    call = attention_call(AttentionShape(""))
    before = [t.clone() for t in call[:8]]
    out = backend(cases.OP, *call)
    for name, t, old in zip(call._fields, call, before):
        assert t.untyped_storage().data_ptr() != out.untyped_storage().data_ptr(), name
        if name not in ("key", "value"):
            assert_bitwise(t, old, name)


# ---- what callers rely on


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
def test_compiles_without_graph_breaks(dynamic):
    call = attention_call(AttentionShape("", (3, -1, 20)), dirty=False)
    compiled = torch.compile(
        lambda *a: jetkernels.attention_step_(*a), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    eager, again = run(OPS, call), run(lambda op, *a: compiled(*a), call)
    for out, expected in zip(again, eager):
        assert_bitwise(out, expected)


def test_autocast():
    """The caches are written in place, so their dtype decides."""
    for dtype in (F32, BF16):
        call = attention_call(AttentionShape(""), dtype)
        mixed = call._replace(q=call.q.to(F32), k=call.k.to(F32), v=call.v.to(F32), cos=call.cos.to(F64))
        expected = run(OPS, call)
        with torch.autocast("cpu", BF16):
            if dtype == F32:
                found = run(OPS, mixed._replace(cos=call.cos))
            else:
                found = run(OPS, mixed._replace(cos=call.cos.to(BF16), sin=call.sin))
                expected = run(OPS, call._replace(cos=call.cos.to(BF16).to(F32)))
        for out, ref in zip(found, expected):
            assert_bitwise(out, ref)


def test_no_gradients():
    call = attention_call(AttentionShape(""))
    before = call.key.clone()
    with pytest.raises(RuntimeError, match=r"attention_step_: v requires a gradient.*torch.no_grad"):
        jetkernels.attention_step_(*call._replace(v=call.v.clone().requires_grad_()))
    assert_bitwise(call.key, before)
    with torch.no_grad():
        version = call.key._version, call.value._version
        jetkernels.attention_step_(*call._replace(v=call.v.clone().requires_grad_()))
        assert call.key._version > version[0] and call.value._version > version[1]


def test_default_scale():
    call = attention_call(AttentionShape(""))
    expected = run(OPS, call)
    assert_bitwise(jetkernels.attention_step_(*call[:8]), expected[0])


def wrong(**changes):
    return changes


CALL = AttentionShape("", (5, 0, 9), H=6, Hkv=2, d=16, L=12)
WRONG = (
    (wrong(q=lambda t: t[0]), "q must have 3 dimensions [N,H,d], got 2"),
    (wrong(q=lambda t: t.to(torch.int32)), "q must be float32 or bfloat16 or float16 or float64, got int32"),
    (wrong(k=lambda t: t[:, :, :8]), "k [N,Hkv,d] dimension 2 must be d = 16 (as in q), got 8"),
    (wrong(q=lambda t: t[:, :5]), "q dimension 1 (H) must be a multiple of Hkv = 2 (as in k), got 5"),
    (wrong(q=lambda t: t[:, :0]), "q dimension 1 (H) must be a multiple of Hkv = 2 (as in k), got 0"),
    (wrong(v=lambda t: t[:, :1]), "v [N,Hkv,d] dimension 1 must be Hkv = 2 (as in k), got 1"),
    (wrong(cos=lambda t: t[:, :8]), "cos [N,d] dimension 1 must be d = 16 (as in q), got 8"),
    (wrong(sin=lambda t: t.double()), "sin must be float32, got float64"),
    (wrong(key=lambda t: t[:2]), "key [N,Hkv,L,d] dimension 0 must be N = 3 (as in q), got 2"),
    (wrong(value=lambda t: t[:, :, :3]), "value [N,Hkv,L,d] dimension 2 must be L = 12 (as in key), got 3"),
    (wrong(key=lambda t: t[:, :, :0], value=lambda t: t[:, :, :0]), "key dimension 2 (L) must be at least 1, got 0"),
    (wrong(key=lambda t: t.to(BF16)), "key must be float32 like q, got bfloat16"),
    (wrong(lengths=lambda t: t.to(torch.int32)), "lengths must be int64, got int32"),
    (wrong(lengths=lambda t: t[:2]), "lengths [N] dimension 0 must be N = 3 (as in q), got 2"),
    (wrong(key=lambda t: t[:1].expand(3, -1, -1, -1)), "key is written in place and must not overlap itself"),
)
ODD = dict.fromkeys(("q", "k", "v", "cos", "sin", "key", "value"), lambda t: t[..., :15])


@pytest.mark.parametrize(
    "changes, says",
    (*WRONG, (ODD, "q dimension 2 (d) must be even and at least 2, got 15")),
    ids=lambda x: " ".join(x) if isinstance(x, dict) else x[:40],
)
def test_a_wrong_argument_is_named(changes, says):
    """By the binding and by the fake implementation in the same words; nothing is written."""
    call = attention_call(CALL)
    bad = call._replace(**{name: change(getattr(call, name)) for name, change in changes.items()})
    before = [t.clone() for t in (call.key, call.value)]
    with pytest.raises(RuntimeError) as error:
        jetkernels.attention_step_(*bad)
    assert str(error.value).startswith("attention_step_: " + says)
    for t, old in zip((call.key, call.value), before):
        assert_bitwise(t, old)
    with pytest.raises(RuntimeError) as fake_error, FakeTensorMode(allow_non_fake_inputs=True) as mode:
        jetkernels.attention_step_(*(mode.from_tensor(t) for t in bad[:8]))
    assert str(fake_error.value) == str(error.value)


@pytest.mark.parametrize("order", ("NLcHd", "NHLcd", "NHcLd", "LNcHd", "NcHLd", "cNHLd", "NHLdc"))
def test_caches_may_lie_between_each_other(order):
    """Keys and values of one tensor, whatever the place of the dimension c that parts them."""
    call = attention_call(CALL)
    sizes = {"c": 2, "N": 3, "H": 2, "L": 12, "d": 16}
    both = torch.zeros([sizes[c] for c in order]).permute([order.index(c) for c in "cNHLd"])
    both.copy_(torch.stack((call.key, call.value)))
    o = jetkernels.attention_step_(*call._replace(key=both[0], value=both[1]))
    for out, expected in zip((o, *both), run(OPS, call)):
        assert_bitwise(out, expected, order)


def test_caches_share_no_memory():
    call = attention_call(CALL)
    both = torch.zeros(3, 2, 13, 16)
    for changes, says in (
        ({"value": call.key}, "key is written in place and must not share memory with value"),
        ({"key": both[:, :, :12], "value": both[:, :, 1:]}, "key is written in place and must not share memory with"),
        ({"v": call.value[:, :, 0]}, "value is written in place and must not share memory with v"),
        ({"q": call.key.flatten(1, 2)[:, :6]}, "key is written in place and must not share memory with q"),
    ):
        with pytest.raises(RuntimeError, match=f"attention_step_: {says}"):
            jetkernels.attention_step_(*call._replace(**changes))
