"""jet::jet_block_step against its definition, and against the ops that it consists of."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import block_properties as properties
from support.arguments import BlockStepCall, block_step_call, with_rows
from support.backends import OPS, PAIRS, each_backend
from support.comparison import DTYPES, assert_bitwise, assert_error
from support.layouts import LAYOUTS, far_apart, with_layouts
from support.shapes import ROWS, ids
from support.strategies import seeds

import jetkernels

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
each_pair = pytest.mark.parametrize("dtype, state_dtype", PAIRS, ids=ids)
SHAPES = (
    {"K": 1, "V": 1, "R": 1},
    {"K": 13, "V": 7, "R": 19},
    {"K": 96, "V": 256, "R": 384, "H": 12},  # the 2B model
    {"K": 16, "V": 32, "R": 64, "H": 1},
    {"K": 33, "V": 70, "W": 2},
    {"K": 8, "V": 130, "H": 3, "W": 3},
)


def random(dtype=F32, state_dtype=None, **more) -> BlockStepCall:
    return block_step_call(dtype=dtype, state_dtype=state_dtype, **more)


@each_backend
@each_pair
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(backend, dtype, state_dtype, shape):
    properties.check(backend, random(dtype, state_dtype, **shape))


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("N", (1, 2, 12, 13, 16, 17, 33, 64))
def test_any_number_of_sequences(backend, dtype, N):
    properties.check(backend, random(dtype, N=N, K=16, V=37, R=70))


@each_backend
@pytest.mark.parametrize("W", (2, 3, 4))
@pytest.mark.parametrize("N", (1, 15, 16, 17, 31, 32, 33, 48, 63))
def test_any_number_of_sequences_in_whole_tiles(backend, N, W):
    """Sizes that the tile registers of AMX take; N is no multiple of their rows."""
    rows = [n if n % 5 else -1 for n in range(N)]
    properties.check(backend, random(BF16, N=N, K=16, V=24, R=96, W=W, rows=rows))


@each_backend
@each_pair
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_any_rows_of_the_pools(backend, dtype, state_dtype, rows):
    for index_dtype in (torch.int32, torch.int64):
        properties.check(backend, with_rows(random(dtype, state_dtype), rows, index_dtype))


@each_backend
@given(
    N=st.integers(1, 20),
    H=st.integers(1, 4),
    K=st.integers(1, 40),
    V=st.integers(4, 70),  # one element may be as good as nothing by cancellation
    R=st.integers(1, 40),
    W=st.integers(2, 4),
    pair=st.sampled_from(PAIRS),
    narrow=st.lists(st.sampled_from(("A_log", "dt_bias", "norm_weight", "bias")), unique=True),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=14, max_size=14),
    data=st.data(),
    seed=seeds,
)
def test_any_shape_dtype_and_layout(backend, N, H, K, V, R, W, pair, narrow, layouts, data, seed):
    """The pools too may be strided, and parameters may have the dtype of the activations."""
    call = random(*pair, N=N, H=H, K=K, V=V, R=R, W=W, seed=seed)
    for name in narrow:
        call = call._replace(**{name: None if name == "bias" else getattr(call, name).to(call.q.dtype)})
    if data.draw(st.booleans()):
        call = call._replace(norm_weight=call.norm_weight.to(call.A_log.dtype))
    rows = data.draw(st.permutations(range(N + 2)))[:N]
    call = with_rows(call, [row if data.draw(st.booleans()) else -row - 1 for row in rows])
    other = with_layouts(call, layouts)
    properties.check(backend, other)
    for name, out, expected in zip(("y", *properties.POOLS), *(properties.run(backend, c) for c in (other, call))):
        assert_error(name, out, expected, 1e-6 if call.q.dtype in (F32, F64) else 1e-2)


@each_backend
@pytest.mark.parametrize("dtype, ceiling", ((F64, 1e-13), (F32, 1e-6), (BF16, 8e-3), (torch.float16, 1e-3)), ids=ids)
@pytest.mark.parametrize("N", (1, 3, 20))
def test_equals_the_ops_that_it_consists_of(backend, dtype, ceiling, N):
    properties.equals_the_ops_that_it_consists_of(backend, random(dtype, N=N, H=3, K=32, V=80, R=96), ceiling)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_the_convolution_shifts_its_state(backend, dtype):
    call = random(dtype, P=3)
    _, conv_state, _ = properties.run(backend, call)
    assert_bitwise(conv_state, torch.cat([call.conv_state[..., 1:], call.v[..., None]], -1), "conv_state")


@each_pair
def test_views_of_one_projection(dtype, state_dtype):
    call = random(dtype, state_dtype, H=3, K=24, V=40, R=24)
    expected = properties.run(OPS, call)
    for pad in (0, 13):
        for out, ref in zip(properties.run(OPS, properties.fused(call, pad)), expected):
            assert_bitwise(out, ref)


@each_backend
@each_pair
def test_which_rows_are_read_and_written(backend, dtype, state_dtype):
    call = random(dtype, state_dtype, V=37)
    properties.negative_index_is_not_a_row(backend, call)
    for rows in ((3, 0, 1), (-1, 2, -1)):
        properties.other_rows_do_not_matter(backend, call, rows)
    for rows in (None, (4, -1, 2)):
        properties.every_element_is_written(backend, with_rows(call, rows))
    properties.writes_to_nothing_but_the_pools(backend, call)


@each_backend
@pytest.mark.parametrize("value", (math.nan, math.inf), ids=str)
def test_nan_stays_in_its_sequence(backend, value):
    for n in range(3):
        properties.nan_stays_in_its_sequence(backend, with_rows(random(V=33), (4, 0, 2)), n, value)


@each_backend
@pytest.mark.parametrize("a", (-200.0, -20.0, 19.9, 20.1, 200.0, math.inf), ids=str)
def test_gates_of_any_size(backend, a):
    """A decay of nearly 1 keeps the state, one of nearly 0 forgets it."""
    for name in ("a", "b"):
        call = random()
        getattr(call, name)[:, 1] = a
        properties.check(backend, call)


@each_backend
def test_zero_keys_queries_and_values(backend):
    call = random()
    for name in ("q", "k", "v", "hidden", "gate"):
        zero = call._replace(**{name: torch.zeros_like(getattr(call, name))})
        y, *pools = properties.run(backend, zero)
        assert y.isfinite().all() and all(pool.isfinite().all() for pool in pools)
    zero = call._replace(v=torch.zeros_like(call.v), conv_state=torch.zeros_like(call.conv_state))
    zero = zero._replace(state=torch.zeros_like(call.state))
    y, *_ = properties.run(backend, zero)
    assert torch.equal(y, torch.zeros_like(y))


@each_backend
def test_repeated_runs_are_equal(backend):
    properties.repeated_runs_are_equal(backend, with_rows(random(BF16, H=12, K=96, V=256, R=384), (4, 0, 2)))


@each_backend
@pytest.mark.parametrize("indexed", (False, True), ids=("rows in order", "indices"))
def test_no_sequences(backend, indexed):
    call = with_rows(random(N=0, P=5), [] if indexed else None)
    y, *pools = properties.run(backend, call)
    assert y.shape == (0, 24)
    for name, pool in zip(properties.POOLS, pools):
        assert_bitwise(pool, getattr(call, name), name)


@pytest.mark.parametrize("threads", (1, 2, 3, 5, 64))
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_threads_that_share_a_head_compute_the_same_bits(threads, dtype):
    """With fewer heads than threads several of them work on one head, and the last of them normalises it."""
    call = with_rows(random(dtype, N=2, H=2, K=96, V=320, R=24), (3, -1))
    expected = properties.run(OPS, call)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for _ in range(20):
            for out, ref in zip(properties.run(OPS, call), expected):
                assert_bitwise(out, ref)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", properties.POOLS)
def test_rows_beyond_32_bits(name):
    call = with_rows(random(BF16, BF16, N=2, P=2), (1, 0))
    expected = properties.run(OPS, call)
    far = call._replace(**{name: far_apart(getattr(call, name), 0)})
    assert_bitwise(OPS(properties.OP, *far), expected[0], "y")
    assert_bitwise(getattr(far, name), expected[1 + properties.POOLS.index(name)], name)


READ = ("q", "v", "hidden", "gate", "weight", "bias", "norm_weight")


@pytest.mark.parametrize(
    "written, other", [(pool, t) for pool in properties.POOLS for t in READ] + [("conv_state", "state")]
)
def test_pools_share_memory_with_nothing(written, other):
    call = random()
    pool, t = getattr(call, written), getattr(call, other)
    shared = torch.zeros(max(pool.numel(), t.numel()) + 1)
    call = call._replace(
        **{written: shared[: pool.numel()].view(pool.shape), other: shared[1 : 1 + t.numel()].view(t.shape)}
    )
    with pytest.raises(RuntimeError, match="is written in place and must not share memory with"):
        torch.ops.jet.jet_block_step(*call)
    assert not shared.any()


def test_keys_of_no_elements_are_refused():
    call = random()
    call = call._replace(q=call.q[..., :0], k=call.k[..., :0], state=call.state[:, :, :0])
    with pytest.raises(RuntimeError, match=r"^jet_block_step: q dimension 2 \(K\) must be at least 1, got 0$"):
        torch.ops.jet.jet_block_step(*call)


def test_the_function_has_the_defaults_of_the_layer():
    call = random()
    again = call._replace(conv_state=call.conv_state.clone(), state=call.state.clone())
    assert_bitwise(jetkernels.jet_block_step_(*call[:14]), torch.ops.jet.jet_block_step(*again), "y")
    assert_bitwise(call.state, again.state, "state")


@pytest.mark.parametrize("dtype", (F32, BF16), ids=ids)
def test_autocast_follows_the_state_of_the_convolution(dtype):
    call = random(dtype)
    wide = call._replace(**{name: getattr(call, name).to(F32) for name in (*properties.TOKENS, "weight", "bias")})
    again = call._replace(
        conv_state=call.conv_state.clone(), state=call.state.clone(), norm_weight=call.norm_weight.to(F32)
    )
    with torch.autocast("cpu", BF16):
        y = torch.ops.jet.jet_block_step(*wide)
    assert_bitwise(y, torch.ops.jet.jet_block_step(*again), "y")
    for name in properties.POOLS:
        assert_bitwise(getattr(wide, name), getattr(again, name), name)
