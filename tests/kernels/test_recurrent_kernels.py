"""The Hopper kernel of the recurrent gated delta rule: its properties on the simulator and on a GPU, its cost, its
machine code.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import backends, draft_properties, pool_properties
from support.arguments import RecurrentCall, recurrent_call, some_prefixes, with_rows
from support.comparison import assert_bitwise
from support.device_backends import EARLY, assert_every_schedule_agrees, each_device, each_machine, hoppersim, simulated
from support.kernel_code import disassembly, report
from support.layouts import with_layouts
from support.pool_properties import run
from support.shapes import DeltaShape, ids
from support.strategies import layouts, seeds, splits

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = tuple(pair for pair in backends.PAIRS if torch.float64 not in pair)  # the kernel takes no fp64
each_pair = pytest.mark.parametrize("dtype, state_dtype", PAIRS, ids=ids)
each_pool = pytest.mark.parametrize("state_dtype", (F32, BF16), ids=ids)
KEY_DIMS = (64, 96, 128, 192, 256)

SHAPES = (
    *(DeltaShape(f"K = {K}", B=2, T=2, H=1, K=K, V=64) for K in KEY_DIMS),
    *(DeltaShape(f"V = {V}", B=1, T=1, H=2, Hk=2, K=64, V=V) for V in (16, 32, 48, 144, 288, 576)),
    *(DeltaShape(f"T = {T}", B=2, T=T, H=2, K=64, V=32) for T in (1, 3, 7, 8, 9, 17)),
    DeltaShape("the 2B model's heads", B=1, T=1, Hk=12, H=12, K=96, V=256),
    DeltaShape("the 4B model's heads", B=1, T=1, Hk=16, H=16, K=128, V=256),
    DeltaShape("three value heads per key head", B=2, T=3, Hk=2, H=6, K=64, V=64),
    DeltaShape("without l2norm", B=2, T=3, K=96, V=64, l2norm=False),
    DeltaShape("a CTA for all slices of a value head", B=99, T=2, Hk=1, H=4, K=64, V=128),
    DeltaShape("a CTA for all slices of a key head", B=99, T=2, Hk=4, H=8, K=64, V=128),
    DeltaShape(
        "more tokens than are prepared at a time, where a CTA could have several slices",
        B=99,
        T=10,
        Hk=4,
        H=4,
        K=64,
        V=128,
    ),
)
AGREE = ("the 2B model's heads", "three value heads per key head", "T = 17", "a CTA for all slices of a key head")


def random(dtype=BF16, state_dtype=F32, shape=DeltaShape("", B=3, T=1, K=64, V=32), **more) -> RecurrentCall:
    return recurrent_call(shape, dtype, state_dtype, **more)


def v_first(call: RecurrentCall) -> RecurrentCall:
    """The same with a pool that lies as [P, H, V, K]."""
    return call._replace(state=call.state.mT.contiguous().mT)


# ---- semantics


@each_device
@each_pair
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.B < 50], ids=ids)
def test_equals_the_reference(backend, dtype, state_dtype, shape):
    pool_properties.check(backend, random(dtype, state_dtype, shape))


@each_device
@each_pool
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.B >= 50], ids=ids)
def test_large_batches(backend, state_dtype, shape):
    pool_properties.check(backend, random(BF16, state_dtype, shape))


@each_device
@each_pool
@pytest.mark.parametrize("T", (1, 3))
@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64), ids=("int32", "int64"))
@pytest.mark.parametrize("rows", (None, (4, 0, 3), (2, -1, 0), (-1, -1, -1), (-7, 4, -1)), ids=str)
def test_any_rows_of_the_pool(backend, state_dtype, T, index_dtype, rows):
    call = random(BF16, state_dtype, DeltaShape("", B=3, T=T, K=64, V=16))
    pool_properties.check(backend, with_rows(call, rows, index_dtype))


@st.composite
def calls(draw) -> RecurrentCall:
    """Any call that the kernel takes, small: its dims, dtypes, rows and layouts."""
    Hk, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = DeltaShape(
        "",
        B=draw(st.integers(1, 4)),
        T=draw(st.integers(1, 11)),
        Hk=Hk,
        H=Hk * group,
        K=draw(st.sampled_from(KEY_DIMS)),
        V=16 * draw(st.integers(1, 5)),
        l2norm=draw(st.booleans()),
    )
    dtype, state_dtype = draw(st.sampled_from(PAIRS))
    call = random(dtype, state_dtype, shape, seed=draw(seeds))
    rows = draw(st.permutations(range(shape.B + 2)))[: shape.B]
    call = with_rows(
        call,
        [row if draw(st.booleans()) else -row - 1 for row in rows],
        draw(st.sampled_from((torch.int32, torch.int64))),
    )
    gates = {name: getattr(call, name).to(draw(st.sampled_from((F32, BF16, F16)))) for name in ("g", "beta")}
    call = with_layouts(call._replace(**gates), draw(layouts)[:5])
    return v_first(call) if draw(st.booleans()) else call


@each_device
@settings(max_examples=40)
@given(call=calls())
def test_any_call(backend, call):
    pool_properties.check(backend, call)


@each_device
@given(data=st.data(), T=st.integers(0, 12), seed=seeds)
def test_any_split_into_calls_equals_one_call(backend, data, T, seed):
    """Bitwise: a state in fp32 is the same in registers and in memory."""
    call = random(BF16, F32, DeltaShape("", B=2, T=T, K=64, V=16), P=2, seed=seed)
    whole, whole_pool = run(backend, call)
    parts, begin = [whole[:, :0]], 0
    for length in data.draw(splits(T)):
        tokens = [t[:, begin : begin + length] for t in call[:5]]
        parts.append(backend("recurrent_gated_delta_rule", *tokens, *call[5:]))
        begin += length
    assert_bitwise(torch.cat(parts, 1), whole, "output")
    assert_bitwise(call.state, whole_pool, "pool")


@each_device
@each_pool
@pytest.mark.parametrize("V", (32, 48))
def test_pool_with_strides(backend, state_dtype, V):
    """Rows, heads and key dims of the pool may be anywhere on a multiple of 16 bytes; what lies between is
    untouched.
    """
    call = random(BF16, state_dtype, DeltaShape("", B=3, T=2, K=64, V=V))
    storage = torch.full((7, 64, 3, V + 16), math.nan, dtype=state_dtype)
    pool = storage.permute(0, 2, 1, 3)[1:6, :2, :, 8 : V + 8]
    pool.copy_(call.state)
    pool_properties.check(backend, with_rows(call._replace(state=pool), (4, 0, 2)))
    backend("recurrent_gated_delta_rule", *call._replace(state=pool))
    assert storage[0].isnan().all() and storage[1:6, :, 2].isnan().all()
    assert storage[1:6, :, :2, :8].isnan().all() and storage[1:6, :, :2, V + 8 :].isnan().all()


@each_device
@each_pair
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.B < 50], ids=ids)
def test_a_pool_with_v_first_gives_the_same_bits(backend, dtype, state_dtype, shape):
    call = random(dtype, state_dtype, shape)
    for out, expected in zip(run(backend, v_first(call)), run(backend, call)):
        assert_bitwise(out, expected)
    drafts = [draft_properties.verify(backend, c) for c in (v_first(call), call)]
    for out, expected in zip(*drafts):
        assert_bitwise(out, expected, "draft")
    pools = [
        draft_properties.commit(backend, c, draft, some_prefixes(shape))
        for c, draft in zip((v_first(call), call), drafts)
    ]
    assert_bitwise(*pools, "committed pool")


@each_device
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.B >= 50], ids=ids)
def test_large_batches_with_v_first(backend, shape):
    for out, expected in zip(run(backend, v_first(random(BF16, BF16, shape))), run(backend, random(BF16, BF16, shape))):
        assert_bitwise(out, expected)


@each_device
def test_indices_with_strides(backend):
    call = with_rows(random(), (4, 0, 2))
    wide = torch.full((3, 5), 1)
    wide[:, 2] = call.state_indices
    pool_properties.check(backend, call._replace(state_indices=wide[:, 2]))


@each_device
@each_pool
def test_index_minus_one_is_not_row_zero(backend, state_dtype):
    pool_properties.negative_index_is_not_a_row(backend, random(BF16, state_dtype))


@each_device
@each_pool
@pytest.mark.parametrize("rows", ((3, 0, 1), (-1, 2, -1)), ids=str)
def test_other_rows_do_not_matter(backend, state_dtype, rows):
    pool_properties.other_rows_do_not_matter(backend, random(BF16, state_dtype), rows)


@each_device
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
@pytest.mark.parametrize("n", range(3))
def test_nan_stays_in_its_sequence(backend, n, value):
    call = random(shape=DeltaShape("", B=3, T=3, K=64, V=32))
    pool_properties.nan_stays_in_its_sequence(backend, with_rows(call, (4, 0, 2)), n, value)


@each_device
@each_pool
def test_a_row_does_not_depend_on_the_others_to_the_bit(backend, state_dtype):
    """Also where another batch size takes other tiles."""
    call = with_rows(random(BF16, state_dtype, DeltaShape("", B=40, T=1, Hk=12, H=12, K=64, V=64), P=42), range(1, 41))
    out, pool = run(backend, call)
    for n in (0, 17, 39):
        alone = with_rows(call._replace(**{name: getattr(call, name)[n : n + 1] for name in call._fields[:5]}), [n + 1])
        one, one_pool = run(backend, alone)
        assert_bitwise(one, out[n : n + 1], "output")
        assert_bitwise(one_pool[n + 1], pool[n + 1], "pool")


@each_device
@each_pool
@pytest.mark.parametrize("rows", (None, (4, -1, 2)), ids=str)
def test_every_element_is_written(backend, state_dtype, rows):
    pool_properties.every_element_is_written(backend, with_rows(random(BF16, state_dtype), rows))


@each_device
def test_updates_in_place_and_repeats_bitwise(backend):
    pool_properties.updates_in_place(backend, random())
    pool_properties.repeated_runs_are_equal(
        backend, with_rows(random(shape=DeltaShape("", B=3, T=4, K=96, V=64)), (4, 0, 2))
    )


@each_machine
def test_row_beyond_32_bits(backend):
    pool_properties.row_beyond_32_bits(backend, random(BF16, BF16, DeltaShape("", B=2, K=64, V=64, T=1), P=2))


@each_device
@pytest.mark.parametrize(
    "shape", (DeltaShape("no tokens", B=2, T=0, K=64, V=32), DeltaShape("no sequences", B=0, T=3, K=64, V=32)), ids=ids
)
def test_nothing_to_do(backend, shape):
    call = random(shape=shape)
    out, pool = run(backend, call)
    assert out.shape == call.v.shape
    assert_bitwise(pool, call.state, "pool")


@each_device
@pytest.mark.parametrize("g", (0.0, -16.0, -104.0, -1e5, -math.inf), ids=str)
def test_decays(backend, g):
    call = random(shape=DeltaShape("", B=3, T=4, K=64, V=32))
    call.g[:, 1] = g
    pool_properties.check(backend, call)


@each_device
def test_long_memory_is_exact(backend):
    """g = 0 and beta = 0 keep a state to the bit."""
    call = random(shape=DeltaShape("", B=2, T=64, K=64, V=16))
    call = call._replace(g=torch.zeros_like(call.g), beta=torch.zeros_like(call.beta))
    _, pool = run(backend, call)
    assert_bitwise(pool, call.state, "pool")


@each_device
def test_zero_keys_and_queries(backend):
    call = random()
    call.k[1], call.q[2] = 0, 0
    pool_properties.check(backend, call)


@each_device
@pytest.mark.parametrize("signs", ((1, 1), (1, -1)), ids=("identical keys", "alternating keys"))
def test_correlated_keys_with_beta_one(backend, signs):
    call = random(shape=DeltaShape("", B=1, T=128, K=64, V=16))
    k = call.k[:, :1] * torch.tensor(signs, dtype=BF16).repeat(64)[:, None, None]
    pool_properties.check(backend, call._replace(k=k, g=torch.zeros_like(call.g), beta=torch.ones_like(call.beta)))


@each_device
def test_bf16_pool_is_rounded_once_per_call(backend):
    call = random(BF16, BF16, DeltaShape("", B=2, T=20, K=64, V=16), P=2)
    out, pool = run(backend, call)
    wide_out, wide_pool = run(backend, call._replace(state=call.state.float()))
    assert_bitwise(out, wide_out, "output")
    assert_bitwise(pool, wide_pool.to(BF16), "pool")


@pytest.mark.parametrize(
    "state_dtype, shape",
    [
        (dtype, shape)
        for shape in SHAPES
        if shape.reason in AGREE
        for dtype in (BF16, F32)
        if shape.B < 50 or dtype == BF16
    ],
    ids=ids,
)
@simulated
def test_every_schedule_agrees(state_dtype, shape):
    call = random(BF16, state_dtype, shape)
    assert_every_schedule_agrees(lambda backend: run(backend, call))


# ---- drafts: verify and commit

DRAFT = DeltaShape("", B=3, T=5, Hk=2, H=4, K=64, V=48)


@each_device
@each_pool
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.T > 0 and shape.B < 50], ids=ids)
def test_drafts_equal_the_reference(backend, state_dtype, shape):
    call = random(BF16, state_dtype, shape)
    draft_properties.check(backend, call, some_prefixes(shape))


@each_device
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.B >= 50], ids=ids)
def test_drafts_of_large_batches(backend, shape):
    draft_properties.check(backend, random(BF16, BF16, shape), some_prefixes(shape))


@each_device
@each_pair
@pytest.mark.parametrize("count", range(6))
def test_any_accepted_prefix_equals_one_call_to_the_bit(backend, dtype, state_dtype, count):
    call = with_rows(random(dtype, state_dtype, DRAFT), (4, 0, 2))
    draft_properties.accepted_prefix_equals_one_call(backend, call, [count, 5 - count, 2])


@each_device
@settings(max_examples=30)
@given(call=calls(), data=st.data())
def test_any_drafts(backend, call, data):
    N, T = call.v.shape[:2]
    draft_properties.check(
        backend, call, data.draw(st.lists(st.integers(0, T), min_size=N, max_size=N)), call.state_indices.dtype
    )


@each_device
@each_pool
def test_draft_properties(backend, state_dtype):
    call = random(BF16, state_dtype, DRAFT)
    draft_properties.any_bits_are_kept_without_an_accepted_token(backend, call)
    draft_properties.negative_index_is_not_a_row(backend, call)
    draft_properties.other_rows_do_not_matter(backend, call, (3, 0, 1))
    draft_properties.rejected_tokens_do_not_matter(backend, call, [3, 0, 5])
    for value in (math.nan, math.inf):
        draft_properties.nan_stays_in_its_sequence(backend, with_rows(call, (4, 0, 2)), 1, value)


@simulated
def test_every_schedule_of_drafts_agrees():
    call = random(BF16, F32, DRAFT)

    def run_both(backend):
        draft = draft_properties.verify(backend, call)
        return (*draft, draft_properties.commit(backend, call, draft, [3, 0, 5]))

    assert_every_schedule_agrees(run_both)


# ---- cost, counted by the simulator

COSTS = (
    DeltaShape("2B, batch 33", B=33, T=1, Hk=12, H=12, K=96, V=256),
    DeltaShape("4B, batch 33", B=33, T=1, Hk=16, H=16, K=128, V=256),
    DeltaShape("128/128, batch 33", B=33, T=1, Hk=16, H=32, K=128, V=128),
)


@simulated
@each_pool
@pytest.mark.parametrize("order", (lambda call: call, v_first), ids=("K before V", "V before K"))
@pytest.mark.parametrize("shape", COSTS, ids=ids)
def test_traffic_is_the_minimum(state_dtype, order, shape):
    """The states once in and once out, every other input and output once, whole sectors, no bank conflicts."""
    call = order(random(BF16, state_dtype, shape, P=shape.B))
    out, _ = run(EARLY, call)
    (launch,) = hoppersim.launches()
    counters = launch["counters"]
    state = call.state.numel() * call.state.element_size()
    inputs = sum(t.numel() * t.element_size() for t in call[:5])
    assert counters["global_read_bytes"] == state + inputs
    assert counters["global_write_bytes"] == state + out.numel() * out.element_size()
    # g and beta of a CTA are part of a sector each; all else is whole sectors
    gates = 2 * shape.B * shape.H
    assert counters["global_read_sectors"] * 32 <= counters["global_read_bytes"] + gates * 32
    assert counters["global_write_sectors"] * 32 == counters["global_write_bytes"]
    assert counters["shared_wavefronts"] <= 1.01 * counters["shared_ideal_wavefronts"]


@simulated
@pytest.mark.parametrize("shape", COSTS, ids=ids)
def test_drafts_read_states_once_and_commit_writes_them_once(shape):
    call = random(BF16, F32, shape._replace(T=2), P=shape.B)
    state = call.state.numel() * call.state.element_size()
    draft = draft_properties.verify(EARLY, call)
    (launch,) = hoppersim.launches()
    inputs = sum(t.numel() * t.element_size() for t in call[:5])
    assert launch["counters"]["global_read_bytes"] == state + inputs
    assert launch["counters"]["global_write_bytes"] == sum(t.numel() * t.element_size() for t in draft)
    draft_properties.commit(EARLY, call, draft, [2] * shape.B)
    (launch,) = hoppersim.launches()
    assert launch["counters"]["global_write_bytes"] == state
    buffers = sum(t.numel() * t.element_size() for t in (*draft[1:], call.g))
    number = 8 * launch["grid"][0] * launch["block"][0]  # one address, asked for by every thread of a CTA
    assert launch["counters"]["global_read_bytes"] == state + buffers + number


@simulated
@pytest.mark.parametrize(
    "state_dtype, B, ctas",
    ((F32, 1, 96), (F32, 8, 384), (F32, 32, 1536), (BF16, 1, 96), (BF16, 8, 384), (BF16, 16, 384), (BF16, 32, 384)),
)
def test_small_batches_spread_over_the_device(state_dtype, B, ctas):
    """Below a full device a CTA has one slice, of a bf16 pool soon two or four: q and k are read by several CTAs, the
    states still once.
    """
    call = random(BF16, state_dtype, DeltaShape("", B=B, T=1, Hk=12, H=12, K=96, V=256), P=B)
    run(EARLY, call)
    (launch,) = hoppersim.launches()
    assert launch["grid"] == [ctas, 1, 1]
    state = call.state.numel() * call.state.element_size()
    inputs = sum(t.numel() * t.element_size() for t in call[:5])
    assert state <= launch["counters"]["global_read_bytes"] - inputs <= 1.1 * state


# ---- what the compiler made


def test_no_spills_and_no_local_memory():
    kernels = report("csrc.gated_delta_rule.recurrent.launch")
    assert len(kernels) == 28, (
        "three ops and a step of a JetBlock; pools by dtype, order and tile, but no fp32 V-first of 64"
    )
    for name, facts in kernels.items():
        assert facts.spill_bytes == 0 and facts.stack_bytes == 0, name
        assert facts.registers <= 96, name
    for name, code in disassembly("csrc.gated_delta_rule.recurrent.launch").items():
        assert not code.uses("LDL", "STL"), name
        # A thread's slice of a column is 4 rows in the smallest tile: 8 bytes of bf16 where V is first.
        small = "4bf16ELi32" in name and "ELb1EEEEE" in name
        width, slice_loads = ("64", 8) if small else ("128", 2)
        loads, others = code.count(f"LDG.E.{width}"), 2 if small else 0
        assert loads - loads % 2 >= slice_loads and loads % 2 <= others, f"{name}: the first slice and the next, whole"
        if "RecurrentModeE1E" not in name:  # verify
            assert code.count(f"STG.E.{width}") >= (loads - others) // 2, name
